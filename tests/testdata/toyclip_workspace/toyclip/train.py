def train(*, model_dir, model, data, total_steps, rate_fn=None, extras=None, eval_data=None):
    built = dict(locals())
    if total_steps < 0:
        from clipa_t5x import errors

        raise errors.UserError("total_steps is negative")
    return built
