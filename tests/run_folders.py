"""Run folders in the shape that the tasks write, with made-up numbers: what a report is tested on."""

import json
import math
import random
from pathlib import Path

import pandas

RELATIONS = ("capital of", "official language", "located in the city of", "profession", "continent", "founded by")


def average(values: list[float]) -> dict:
    """A made-up interval around the true mean."""
    mean = sum(values) / len(values)
    width = 1.96 * math.sqrt(sum((v - mean) ** 2 for v in values) / len(values) ** 2)
    return {"mean": mean, "n": len(values), "low": max(0.0, mean - width), "high": min(1.0, mean + width)}


def record(task: str, method: str, *, model="atlas", data_name="atlas", seed=0, **changes) -> dict:
    """record.json without its metrics."""
    base = {
        "task": task,
        "config": {
            "task": {"name": task},
            "model": {"name": model, "dtype": "float32", "revision": None},
            "data": {"name": data_name, "path": None, "limit": 300, "shard": "0/1"},
            "method": {"name": method, "layer": 4 if method.endswith("rome") else None, "kl_factor": 0.0625},
            "moments": {"source": "atlas", "tokens": 40000},
            "seed": seed,
        },
        "model": {"name": model, "digest": "c8436304" * 8, "dtype": "float32", "device": "cpu"},
        "edit": {},
        "metrics": {},
        "series": [],
        "reversal": {"exact": True, "tensors": 100, "bytes": 15220224, "unequal": []},
        "timings": {"load": 0.8, "measure_before": 20.5, "edit": 212.25, "measure_after": 31.0, "total": 264.55},
        "environment": {
            "editkit": "0.1.0",
            "commit": "793379ebdd2d53bfa3c4d17458d62ce9f22b23ef",
            "python": "3.11.7",
            "packages": {"torch": "2.13.0", "transformers": "5.23.0"},
            "platform": "Linux",
            "device": "cpu, 2 cores",
            "command": ["editkit/run.py", f"task={task}", f"method={method}", "hydra.run.dir=runs/x"],
        },
        "data": {"source": data_name, "digest": "ab" * 32, "found": 310, "rejected": [], "shard": "0/1"},
    }
    return base | changes


def benchmark(folder: Path, method: str = "r_rome", *, cases: int = 60, good: float = 0.9, seed: int = 0, **changes):
    """A benchmark's folder; its record."""
    draw = random.Random(f"{method}{seed}")
    rows, probes = [], []
    for i in range(cases):
        relation = RELATIONS[int(draw.random() ** 2 * len(RELATIONS))]
        row = {
            "case": str(i),
            "subject": f"Subject {i}",
            "relation": relation,
            "rank": 1,
            "norm": 6 * draw.lognormvariate(0, 0.25),
            "relative_norm": 0.18 * draw.lognormvariate(0, 0.25),
            "seconds": 2 * draw.lognormvariate(0, 0.1),
        }
        shown = [("rewrite", 1), ("paraphrase", 2), ("neighborhood", 5), ("portability", 1)]
        for kind, count in shown:
            for number in range(count):
                stays = kind == "neighborhood"
                p_true, p_new = draw.uniform(0.6, 0.99), draw.uniform(0, 0.02)
                lands = draw.random() < good
                after = (p_true * 0.9, p_new * 2) if lands == stays else (draw.uniform(0, 0.2), draw.uniform(0.5, 0.99))
                probe = {
                    "case": str(i), "relation": relation, "kind": kind, "group": "",
                    "prompt": f"Subject {i} in phrasing {number} is the {relation}",
                    "target_true": "Old", "target_new": "New",
                }  # fmt: skip
                for when, (true, new) in (("before", (p_true, p_new)), ("after", after)):
                    probe |= {f"probability_true_{when}": true, f"probability_new_{when}": new}
                    probe |= {f"nll_true_{when}": -math.log(true), f"nll_new_{when}": -math.log(max(new, 1e-9))}
                    probe |= {
                        f"said_{when}": f" {'New' if new > true else 'Old'}. And so on",
                        f"exact_{when}": new > true,
                    }
                probes.append(probe)
        mine = [p for p in probes if p["case"] == str(i)]
        for name, kind, sign in (("ES", "rewrite", 1), ("PS", "paraphrase", 1), ("NS", "neighborhood", -1)):
            for when in ("before", "after"):
                wins = [sign * (p[f"nll_true_{when}"] - p[f"nll_new_{when}"]) > 0 for p in mine if p["kind"] == kind]
                row[f"counterfact.{name}_{when}"] = sum(wins) / len(wins)
        for when in ("before", "after"):
            row[f"zsre.efficacy_{when}"] = row[f"counterfact.ES_{when}"]
            row[f"generation.rewrite_{when}"] = float(mine[0][f"exact_{when}"])
            row[f"counterfact.NM_{when}"] = draw.uniform(0.4, 0.8)
        row["easyedit.locality_after"] = draw.uniform(0.7, 1)
        row["counterfact.GE_after"] = None if i % 2 else draw.uniform(5, 6.3)
        rows.append(row)
    names = [name for name in rows[0] if "." in name]
    found = {name: average([r[name] for r in rows if r[name] is not None]) for name in names}
    found["counterfact.GE_after"] |= {"high": None, "low": None}
    harmonic = 3 / sum(1 / max(found[f"counterfact.{n}_after"]["mean"], 1e-9) for n in ("ES", "PS", "NS"))
    found["counterfact.S_after"] = {"mean": harmonic, "n": cases, "low": harmonic - 0.02, "high": harmonic + 0.02}
    found["counterfact.RS_after"] = {"mean": None, "n": 0, "low": None, "high": None}
    return _write(folder, record("benchmark", method, seed=seed, metrics=found, **changes), probes, rows)


def lifelong(folder: Path, method: str = "r_rome", *, lasts: float = 300, points: int = 11, seed: int = 0, **changes):
    """A lifelong run's folder, whose retention halves at about `lasts` edits; its record."""
    draw, series = random.Random(f"{method}{seed}"), []
    for edits in [500 * i // (points - 1) for i in range(points)][1:]:
        kept = 1 / (1 + (edits / lasts) ** 3)
        metrics = {}
        for group, share in (("retention", kept), ("recent", min(1.0, kept + 0.2)), ("untouched", 0.5 + kept / 2)):
            for name, factor in (("ES", 1.0), ("PS", 0.95), ("NS", 0.9)):
                mean = min(1.0, max(0.0, share * factor + draw.uniform(-0.02, 0.02)))
                metrics[f"{group}.{name}"] = {
                    "mean": mean, "n": edits, "low": max(0.0, mean - 0.05), "high": min(1.0, mean + 0.05)
                }  # fmt: skip
        growth = 0.2 * math.exp(edits / lasts)
        series.append({
            "edits": edits, "metrics": metrics, "relative_norm": growth, "kl": growth**2 / 10,
            "perplexity": 20 + growth**3, "collapsed": kept < 0.3,
        })  # fmt: skip
    spectra = [{
        "parameter": "transformer.h.4.mlp.c_proj.weight",
        "singular_values": [10 * 0.97**i for i in range(192)],
        "base_singular_values": [4 * 0.99**i for i in range(192)],
    }]  # fmt: skip
    edit = {"rank": 192, "norm": 50.0, "relative_norm": series[-1]["relative_norm"], "spectra": spectra}
    return _write(folder, record("lifelong", method, seed=seed, series=series, edit=edit, **changes))


def _write(folder: Path, found: dict, probes=None, rows=None) -> dict:
    folder.mkdir(parents=True, exist_ok=True)
    if probes is not None:
        pandas.DataFrame(probes).to_parquet(folder / "cases.parquet")
        pandas.DataFrame(rows).to_parquet(folder / "edits.parquet")
    (folder / "config.yaml").write_text("seed: 0\n")
    (folder / "record.json").write_text(json.dumps(found, ensure_ascii=False), encoding="utf-8")
    return found
