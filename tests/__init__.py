"""Tests: the rooms mirror the package, a file for each of its modules.

``compatibility`` (Python and torch versions), ``fuzz`` and ``hostile`` (broken and evil files) and
``training`` (the harness in which the real Megatron-Core trains and saves on a CPU, and judges what
was converted) have no counterpart in the package.

``data`` holds checkpoints that Megatron saved: ``pairs`` unpacks them, ``families`` reads them
once for all tests, ``edit`` changes their files. ``runs`` runs the command line, ``inline`` does
what workers do in this process, ``strategies`` draws layouts and buffers, ``examples`` says how
many. ``compare`` is the independent judge of a converted folder, on torch alone.

Three inert unpicklers exist on purpose, so that none is judged by itself: the product's
(``container.pickling``), that of its check (``verification.torch_loading``) and the judge's
(``tests.compare``).
"""
