"""What several methods share: facts checked and moments found, contexts, values, the linear solves over blocks."""
