"""paper/cost.csv: what each table of the paper costs from nothing.   python -m tools.cost_table"""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from unittest import mock

import pandas as pd
import torch

from lgap_utils.profiles import ROOT, get_profile
from tools.bench import networks
from tools.cost import RATES, count, flops_of, time_range
from tools.doctor import bytes_text, size_text
from tools.needs import Item, data_sets, models_of
from tools.request import parameters, select, values_for

RUNS = {"Table 1": "03,04", "Table 2": "05", "Table 3": "03,06", "Table 4": "07"}  # notebooks of each table


def table_of_costs(name: str = "paper") -> pd.DataFrame:
    """What each of the paper's tables costs at a profile from nothing: command, downloads, memory, time."""
    with torch.device("meta"):
        weights = sum(p.numel() for network in networks().values() for p in network.parameters())
    lines = []
    with tempfile.TemporaryDirectory() as empty:
        for table, only in RUNS.items():
            paths = select(sorted((ROOT / "notebooks").glob("[0-9]*.ipynb")), only.split(","))
            costs = count({path: values_for(parameters(path), {}, name) for path in paths})
            profile = get_profile(name, int(table[-1]))
            with mock.patch.dict(os.environ, LGAP_DATA=empty, LGAP_CACHE=empty):
                needs = [*models_of([profile]), *data_sets([profile])]
            sizes = [size for need in needs if isinstance(need, Item) for size in need.absent.values()]
            total = sum((counts for _, counts in costs.values()), Counter())
            flops = sum(total[what] * each for what, each in flops_of(profile).items())
            line = {"table": table, "command": f"./run_all.sh {name} --only {only}"}
            line |= {"downloads": size_text(sizes), "weights on the GPU": bytes_text(2 * weights)}
            lines.append(line | {"time on one GPU": time_range(*(flops / rate for rate in RATES))})
    return pd.DataFrame(lines)


if __name__ == "__main__":
    table_of_costs().to_csv(ROOT / "paper" / "cost.csv", index=False)
