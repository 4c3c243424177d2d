"""``ep-comm plan``: what dispatch and combine will take on a cluster, from a simple model.

``docs/plan.md`` states the model. ::

    facts.py      the constants that the model rests on, each with its source
    sizes.py      a cluster, and what it has to move
    copies.py     how many ranks and nodes a token goes to, by combinatorics
    kernels.py    SMs and chunks, as our kernels choose them
    memory.py     memory of a buffer
    model.py      bytes, times, and what limits them
    report.py     a plan as table and JSON
    curves.py     plans of 1 to 1024 GPUs, as a picture
    check.py      the model beside what was measured
"""
