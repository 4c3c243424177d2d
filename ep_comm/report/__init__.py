"""One page about a run of ``examples/pretrain_moe.py``, or about two beside each other.

`run` reads the folder, `findings` says in words what stands out, `pictures` draws, `page` puts it
together. `live` shows the run in a terminal. Neither Megatron nor a GPU is needed.
"""
