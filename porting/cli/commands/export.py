"""``export``: check the weights, write them for another program, say what was checked."""

from __future__ import annotations

import os

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from porting.cli.arguments.export import ExportOptions
from porting.cli.commands.source import describe
from porting.cli.process import print_json
from porting.errors import OutputError
from porting.export import TARGETS, Weights
from pytorch_model.weights.checks import check_weights
from pytorch_model.weights.files import read_any, weight_file


def run(options: ExportOptions) -> int:
    console = Console(stderr=options.json, highlight=False)
    state_dict, config, metadata = read_any(options.weights)
    if os.path.exists(options.out) and os.path.samefile(options.out, weight_file(options.weights)):
        raise OutputError(f"--out {options.out} is the file that --weights reads; choose another name")
    check_weights(state_dict, config, str(options.weights))
    with console.status(f"writing {options.target} …"):
        written = TARGETS[options.target].write(Weights(state_dict, config, metadata), options.out)
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    table.add_row("read", escape(str(options.weights)))
    table.add_row("model", escape(describe(config)))
    for fact in written.facts:
        table.add_row("", escape(fact))
    for path in written.files:
        table.add_row("wrote", f"{escape(str(path))} ({path.stat().st_size / 1e6:.1f} MB)")
    console.print(table)
    if options.json:
        files = [str(path) for path in written.files]
        print_json({"target": options.target, "model": config.name, "files": files, "facts": written.facts})
    return 0
