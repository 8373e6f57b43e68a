"""+reproduce=NAME: a published table's own setting, what a run differs in, and both figures side by side."""

import re
from pathlib import Path

import pytest

from editkit.config import CONF_DIR, _composed, options, prepare, to_config
from editkit.errors import ConfigError
from editkit.report import published
from editkit.runs.read import Run
from editkit.settings import Config
from tests.run_folders import really_run

TABLES = ("alphaedit_2000", "memit_counterfact", "rome_table4")
STAND_IN = ["model=atlas", "data=atlas", "moments.source=atlas", "moments.tokens=2000"]


def config_of(*overrides: str) -> Config:
    ready = dict(text.split("=", 1) for text in prepare(list(overrides)))
    return to_config(_composed(ready))


def test_the_tables_are_those_of_published() -> None:
    assert options("reproduce") == sorted(TABLES) == sorted({row.table for row in published.TABLE} - {""})


@pytest.mark.parametrize("table", TABLES)
def test_as_it_is_a_table_differs_in_nothing_and_is_the_rows_setting(table: str) -> None:
    config = config_of(f"+reproduce={table}", "data.path=counterfact.json")
    assert config.reproduces is not None and config.reproduces.name == table and config.reproduces.differs == ()
    rows = [row for row in published.TABLE if row.table == table and row.method == config.method_name]
    (row,) = rows
    assert (config.task.name, config.data.limit) == (row.task, row.records)
    assert config.model.name.rpartition("/")[2] == row.model and config.data.name == "counterfact"
    assert row.source in re.sub(r":.*", "", (CONF_DIR / f"reproduce/{table}.yaml").read_text().splitlines()[1])


def test_every_setting_that_differs_is_named() -> None:
    config = config_of("+reproduce=rome_table4", *STAND_IN, "data.limit=2", "method.steps=3")
    assert config.reproduces is not None
    assert set(config.reproduces.differs) == {
        "model.name: atlas, there openai-community/gpt2-xl",
        "data.name: atlas, there counterfact",
        "data.limit: 2, there 7500",
        "method.steps: 3, there None",
        "moments.source: atlas, there hub:wikimedia/wikipedia:20231101.en",
        "moments.tokens: 2000, there 10000000",
    }
    other = config_of("+reproduce=rome_table4", "method=r_rome", "data.path=counterfact.json")
    assert other.reproduces is not None and other.reproduces.differs == ("method.name: r_rome, there rome",)


def test_a_table_that_there_is_none_of_is_refused() -> None:
    with pytest.raises(ConfigError, match="No reproduce 'rome_table': did you mean 'rome_table4'"):
        prepare(["+reproduce=rome_table"])
    with pytest.raises(ConfigError, match="No table 'x' for reproduces"):
        config_of("reproduces=x")


def test_a_stand_in_runs_to_the_end_and_says_that_it_is_one(tmp_path: Path) -> None:
    overrides = [*STAND_IN, "data.limit=2", "method.steps=3", "method.contexts.counts=[1,1]", "task.measure.fluency=0"]
    run = Run.at(really_run(tmp_path / "run", "+reproduce=rome_table4", *overrides))
    lines = published.lines(run)
    assert lines[0] == "after rome_table4: a stand-in, another model or other data"
    assert any(line.startswith("  rome, arXiv 2202.05262, table 4, here (printed): S ") for line in lines)
    assert "ES 0.000 (0.222)" in lines[1] and "  differs: data.limit: 2, there 7500" in lines
    assert "data.limit: 2, there 7500" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
