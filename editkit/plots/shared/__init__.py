"""What several plots share: a blank figure with safe text, panels of heat maps, a figure that knows its numbers."""
