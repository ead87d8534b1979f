def steps_from_samples(samples, batch_size=10):
    return samples // batch_size


def warmup(step, peak=1.0, warmup_steps=0):
    return peak * min(1.0, step / warmup_steps) if warmup_steps else peak


def halved(value):
    return value / 2
