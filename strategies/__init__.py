"""What is committed, and when: devices, arenas, the page allocator and the strategies.

A strategy knows no Hydra, no pandas and no report; it imports from ``kernels`` only the geometry
and the view. No module here imports torch at import time, so that planners and host bracket
trials start in a tenth of a second.
"""
