"""The products of `precision --rivals` by libraries that install from the Python registry: numpy's OpenBLAS and torch's oneDNN.

Usage: blas.py OUTPUTS INPUTS ROWS REPEATS ROUNDS THREADS. One JSON line: seconds of a product, the median of the rounds.
"""

import json
import os
import statistics
import sys
import time

outputs, inputs, rows, repeats, rounds, threads = map(int, sys.argv[1:])
for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[name] = str(threads)

import numpy
import torch

torch.set_num_threads(threads)
rng = numpy.random.default_rng(3)
# Weights in turn, so that they come from memory as they do in a model and not from a cache.
copies = max(1, (128 << 20) // (4 * outputs * inputs))
weights = [rng.uniform(-1, 1, (outputs, inputs)).astype(numpy.float32) for _ in range(copies)]
x = rng.uniform(-1, 1, (rows, inputs)).astype(numpy.float32)
tensors, x_tensor = [torch.from_numpy(weight) for weight in weights], torch.from_numpy(x)


def seconds(product):
    times = []
    for turn in range(rounds):
        begin = time.perf_counter()
        for i in range(repeats):
            product((turn * repeats + i) % copies)
        times.append((time.perf_counter() - begin) / repeats)
    return statistics.median(times)


with torch.inference_mode():
    print(
        json.dumps(
            {
                "OpenBLAS (numpy)": seconds(lambda i: x @ weights[i].T),
                "oneDNN (torch)": seconds(lambda i: torch.nn.functional.linear(x_tensor, tensors[i])),
            }
        )
    )
