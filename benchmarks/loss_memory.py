"""Memory and compute of the contrastive losses alone, forward and backward, by XLA for a TPU slice.

`python benchmarks/loss_memory.py [--topology=v5e-256] [--batch=65536] [--dim=1280]` needs libtpu,
no chips. Embeddings arrive split by rows over all chips, as the towers leave them.
"""

import argparse
import functools
import time

import jax
import jax.numpy as jnp

from clipa_t5x import hlo_analysis, losses, partitioning, topologies


def sigmoid(images, texts, scale, num_chunks=1):
    bias = jnp.float32(-10.0)
    return losses.sigmoid_contrastive(images, texts, scale, logit_bias=bias, num_chunks=num_chunks)


FORMS = {
    "softmax": losses.softmax_contrastive,
    "softmax, 4 chunks": functools.partial(losses.softmax_contrastive, num_chunks=4),
    "softmax, 16 chunks": functools.partial(losses.softmax_contrastive, num_chunks=16),
    "sigmoid": sigmoid,
    "sigmoid, 4 chunks": functools.partial(sigmoid, num_chunks=4),
    "sigmoid, 16 chunks": functools.partial(sigmoid, num_chunks=16),
}


def measure(form, dtype, batch, dim, partitioner):
    """(peak MiB of a chip, XLA's mega-cycles, GB of collectives, seconds to compile)."""
    rows = partitioner.batch_sharding()
    embeddings = jax.ShapeDtypeStruct((batch, dim), dtype, sharding=rows)
    scale = jax.ShapeDtypeStruct((), jnp.float32)
    gradient = jax.value_and_grad(lambda x, y, s: FORMS[form](x, y, s)[0], (0, 1, 2))
    start = time.perf_counter()
    with partitioner.activate():
        step = jax.jit(gradient, out_shardings=(None, (rows, rows, None)))
        compiled = step.lower(embeddings, embeddings, scale).compile()
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    assert memory is not None
    analysis = hlo_analysis.analyze(compiled.as_text() or "")
    sent = sum(c.bytes for c in analysis.collectives.values())
    peak = memory.peak_memory_in_bytes
    return peak / 2**20, analysis.cycles / 1e6, sent / 1e9, seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--topology", default="v5e-256")
    parser.add_argument("--batch", type=int, default=65536)
    parser.add_argument("--dim", type=int, default=1280)
    parser.add_argument("--forms", nargs="*", default=list(FORMS), choices=list(FORMS))
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    topology = topologies.parse(args.topology)
    partitioner = partitioning.PjitPartitioner(devices=topology.devices())
    print(f"{topology.name}, batch {args.batch}, dim {args.dim}; per chip")
    print(f"{'form':20} {'embeddings':10} {'peak MiB':>9} {'Mcycles':>8} {'GB sent':>8} {'s':>5}")
    for form in args.forms:
        for dtype in ("float32", "bfloat16"):
            peak, cycles, sent, seconds = measure(form, dtype, args.batch, args.dim, partitioner)
            print(f"{form:20} {dtype:10} {peak:9.0f} {cycles:8.1f} {sent:8.2f} {seconds:5.0f}")


if __name__ == "__main__":
    main()
