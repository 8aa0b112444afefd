"""The numbers of the memory plan that were measured, not derived; all of them stand here.

`python benchmarks/plan_accuracy.py --constants` measures them again on its calibration rows (which
are none of the rows the plan is then judged on) and prints this file's values.
"""

MIB = 2**20

# What a process holds once it has trained a model of no size: Python, torch, its libraries and
# threads (Linux, torch 2.13 for CPUs). Used where the machine itself is not measured.
PROCESS = 410 * MIB
# A CUDA context and the libraries' own workspaces, which no allocator statistic shows.
CUDA_CONTEXT = 520 * MIB

# The C library's heap keeps what was freed between tensors that live. Of tensors below 32 MiB
# (larger ones go back to the system), measured with glibc: a fixed part, a share of what lies
# between forward and backward, and, where blocks are recomputed, a multiple of one block's tensors.
HEAP_FIXED = 80 * MIB
HEAP_SHARE = 0.21
HEAP_RECOMPUTED = 3.3

# Share of a machine's memory that a plan leaves free.
MARGIN = 0.10
