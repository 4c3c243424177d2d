"""One page about a run of ``examples/pretrain_moe.py``, or about two beside each other.

`run` reads the folder, `findings` says in words what stands out, `pictures` draws, `page` puts it
together. `live` shows the run in a terminal. Neither Megatron nor a GPU is needed.

`document` is what pages are made of, and their renderer: that of ``ep-comm compare`` is made by it
too, and those of the benchmarks (`screen`).
"""
