import dataclasses


@dataclasses.dataclass
class DatasetConfig:
    batch_size: int
    task: str = "toy"
    seed: int = 0


def name_of(task="none"):
    return task
