"""``python -m bench NAME``: measurements that serve those who change this library, with the options of ``lozo-kernels bench``."""

import sys

from lozo_kernels.bench import main

from . import compiling, exactness, fits, host, rehearsal

MEASUREMENTS = {
    "host": (host, "what a pass over a model costs in Python, with its kernel launches left out"),
    "kernels": (compiling, "what the stages of make bench-gpu launch, compiled ahead on all cores, without a GPU"),
    "rehearsal": (rehearsal, "whether make bench-gpu fits into its time, measured without a GPU"),
    "fits": (fits, "whether a model and a step on it fit into a device"),
    "exactness": (exactness, "whether U V^T is exact: on matrix units in fp16 with fp32 sums, and in the kernels"),
}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], MEASUREMENTS, ("python", "-m", "bench")))
