"""A call as it was meant: options that fit together, roots of checkpoints taken for iterations."""

from __future__ import annotations

from dataclasses import replace

from ..errors import CheckpointError, refusals
from ..options import Options, Task
from ..source.iteration import is_iteration, source_dir, tracked


def ready(options: Options) -> Options:
    """Options checked, with the iteration folders in the place of roots.

    A source's root means the iteration that its tracker names. A target's root means that of its
    own tracker when it is verified, else the folder of the source's name in it; a new folder is
    a root if the source was given by its root.

    Raises:
        UsageError: options contradict each other.
        CheckpointError: the source cannot be looked at, or its tracker names an iteration that is
            not there.
        CopyError: the target cannot be looked at.
    """
    options.check()
    with refusals(None, "cannot be read", CheckpointError):
        load_dir, save_dir = source_dir(options.load_dir), options.save_dir
    with refusals(None, "cannot be looked at"):
        if save_dir is not None and not is_iteration(save_dir):
            told = tracked(save_dir)
            if told is not None and options.task is Task.VERIFY:
                save_dir /= told
            elif told is not None or load_dir != options.load_dir:
                save_dir /= load_dir.name
    return replace(options, load_dir=load_dir, save_dir=save_dir)
