"""SavedModel folders: where their variables are, which of them are used, and what the graph states."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path, PurePath

from porting.checkpoint.base import Checkpoint
from porting.checkpoint.graph.nodes import graph_of_meta, graphs_of_saved_model, read_graph_def
from porting.checkpoint.graph.settings import GraphSettings, read_settings
from porting.checkpoint.messages import unreadable
from porting.checkpoint.renamed import Renamed, Source
from porting.errors import CheckpointError
from porting.scopes import EMA_SUFFIX
from pytorch_model.files import check_regular, read_bounded
from pytorch_model.formats.wire import Malformed

FORMAT = "TensorFlow SavedModel"

_MOST_BYTES = (1 << 31) - 1  # protocol buffers allow no larger message
_GRAPHS = ("saved_model.pb", "saved_model.pbtxt")
_VARIABLES = "variables"  # the folder in a SavedModel, and also the prefix in that folder


def saved_model_prefix(path: str | os.PathLike[str]) -> Path | None:
    """The prefix of the variables of the SavedModel at ``path`` (its folder or graph); None if it is not one.

    Raises CheckpointError for a SavedModel without variables.
    """
    path = Path(path)
    folder = path.parent if path.name in _GRAPHS else path
    for graph in _GRAPHS:
        try:
            check_regular(folder / graph)
        except OSError as error:
            raise unreadable(folder / graph, error) from None
    prefix = folder / _VARIABLES / _VARIABLES
    if os.path.isfile(f"{prefix}.index"):
        return prefix
    if any(os.path.isfile(folder / graph) for graph in _GRAPHS):
        raise CheckpointError(
            f"{folder} is a SavedModel without variables: there is no {prefix}.index; fetch the whole folder"
        )
    return None


def is_saved_model(prefix: str) -> bool:
    """Whether the checkpoint at ``prefix`` is in a SavedModel. No training script uses this name."""
    return PurePath(prefix).name == _VARIABLES


def as_served(checkpoint: Checkpoint) -> Checkpoint:
    """The variables that a SavedModel's graph computes with: those without the moving-average suffix.

    To export, AutoML restores the moving averages *into* the plain variables. In doing so it creates a second
    set of averages, which keep their random initial values and are saved too.
    """
    twins = [name for name in checkpoint if name.endswith(EMA_SUFFIX)]
    sources = {name: Source(name) for name in checkpoint if not name.endswith(EMA_SUFFIX)}
    notes = []
    if twins:
        notes.append(
            f"left out {len(twins)} moving averages: a SavedModel computes with the plain variables, which "
            "AutoML set to the averages when it exported the model"
        )
    stated = _stated(Path(checkpoint.location).parent.parent / _GRAPHS[0], graphs_of_saved_model)
    settings = {**stated.fields, **checkpoint.settings}
    return Renamed(checkpoint, sources, FORMAT, [*notes, *stated.notes], settings)


def with_meta_settings(checkpoint: Checkpoint) -> Checkpoint:
    """``checkpoint`` with what its ``.meta`` file states, the graph that TensorFlow 1 saves beside it."""
    stated = _stated(Path(f"{checkpoint.location}.meta"), lambda data: [graph_of_meta(data)])
    if not stated.fields and not stated.notes:
        return checkpoint
    settings = {**stated.fields, **checkpoint.settings}
    sources = {name: Source(name) for name in checkpoint}
    return Renamed(checkpoint, sources, checkpoint.format, stated.notes, settings)


def _stated(path: Path, graphs_in: Callable[[memoryview], list[memoryview]]) -> GraphSettings:
    """What the graph at ``path`` states besides the weights, which do not depend on it."""
    try:
        graphs = graphs_in(memoryview(read_bounded(path, _MOST_BYTES)))
        return read_settings(node for graph in graphs[:1] for node in read_graph_def(graph))
    except FileNotFoundError:  # no .meta, or a saved_model.pbtxt
        return GraphSettings({}, ())
    except (OSError, Malformed) as error:
        return GraphSettings({}, (f"the settings in {path} cannot be read: {error}",))
