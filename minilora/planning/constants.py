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
HEAP_FIXED = 83 * MIB
HEAP_SHARE = 0.21
HEAP_RECOMPUTED = 3.16
# In a Llama computed in f32 the heap grows by this share of a block with every block run again
# (GPT-2's, and bf16, do not; with MALLOC_MMAP_THRESHOLD_ set nothing of it is seen).
HEAP_EACH_F32 = 0.35

# Share of a machine's memory that a plan leaves free.
MARGIN = 0.10
