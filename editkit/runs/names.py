"""The names of a run folder's files, and the version of their format: written here, and nowhere else."""

FORMAT = 2  # of record.json, journals and tables; 1 had metrics by name, with "_before" and "_after" behind them

RECORD = "record.json"
PLAN = "plan.json"  # of a run that was planned and not started
CONFIG = "config.yaml"
FAILED = "failed.txt"
REPORT = "report.html"
ABILITY = "ability.json"  # general ability, as soon as it has been asked
EDIT = "edit.safetensors"
CASES = "cases.parquet"  # a row a prompt
EDITS = "edits.parquet"  # a row a case: its edit and the value of every metric
CONTROL_CASES = "control_cases.parquet"  # with task.controls: a row a control and prompt
CONTROL_EDITS = "control_edits.parquet"  # a row a control and case
SUMMARY = "summary.csv"  # a row a metric
AUDIT = "audit.parquet"
JUDGED = "judged.jsonl"  # a line an answer: the question, the verdict, its cost
TABLE = "table.csv"  # of a sweep: a row a run
PAIRED = "paired.csv"  # of a sweep: a row a metric and two runs on the same cases

# Journals: results line by line, from which a run that was killed goes on.
CASE_LINES = "cases.jsonl"
POINT_LINES = "points.jsonl"
FACT_LINES = "facts.jsonl"
COSTS = "costs.jsonl"  # of a lifelong run: seconds and memory of each step

# Folders.
EDIT_FILES = "edits"
AUDITS = "audits"
SESSION = "session"

# Of a trace: .npz and .json of one fact or of the average, and the average as a table.
TRACE = "trace"
AVERAGE = "average"
AVERAGE_TABLE = "average.parquet"

# A folder that holds one of these is a run's, begun or finished.
OF_A_RUN = frozenset({RECORD, CONFIG, FAILED, CASES, EDITS, CASE_LINES, POINT_LINES, FACT_LINES})
