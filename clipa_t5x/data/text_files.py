"""Small files that are read whole: vocabularies, class names, tables beside them."""

from clipa_t5x.errors import UserError

# A hundred times the greatest vocabularies; a path to data or weights, by mistake, is refused.
MAX_BYTES = 2**26


def read(path: str, what: str) -> bytes:
    """The bytes of a file, local or remote, that should be small.

    Args:
      path: of a file that exists.
      what: it is, in errors: 'vocabulary'.

    Raises:
      UserError: it has more than 64 MiB, or cannot be read.
    """
    import tensorflow as tf  # here, since processes that convert shards do without

    try:
        size = tf.io.gfile.stat(path).length
        if size > MAX_BYTES:
            raise UserError(
                f"{what} file {path} has {size} bytes, and one of more than {MAX_BYTES} is another "
                "file, given by mistake: give a text file, one item a line."
            )
        with tf.io.gfile.GFile(path, "rb") as file:
            return file.read()
    except tf.errors.OpError as error:
        raise UserError(
            f"{what} file {path} cannot be read ({error.message}): give a text file."
        ) from error
