"""Sweeps whose law is known."""

from clipa_t5x import sweep_runs

SHARES = (1.0, 0.5, 0.25, 1 / 9)
SIZES = {1_000_000: 0.12, 4_000_000: 0.06, 16_000_000: 0.03}


def run(params, share, seed=0, accuracy=0.5, **changes):
    values = {
        "name": f"{params} {share:.2f} {seed}",
        "size": sweep_runs.Size(f"{params / 1e6:.0f}M", (params,), params),
        "pixels": 48.0,
        "image_tokens": round(36 * share),
        "image_area": share,
        "text_tokens": 16.0,
        "seed": seed,
        "samples": 1000.0,
        "training_flops": params * share * 6e3,
        "accuracy": accuracy,
        "examples": 100_000,
        **changes,
    }
    return sweep_runs.Run(**values)


def accuracy(params, share):
    """A power law of the share: larger models lose less."""
    return 0.7 - SIZES[params] * (share**-0.5 - 1)


def runs(seeds=(0,)):
    return [
        run(params, share, seed, accuracy(params, share) + 1e-4 * seed)
        for params in SIZES
        for share in SHARES
        for seed in seeds
    ]


def sweep(found):
    return sweep_runs.sweep(found, "zoo", "accuracy")
