from sam_jax.commands.common import say, say_compiling


def test_progress_is_not_output(capsys):
    """A program that reads a command's output gets only its results."""
    say("one of two images")
    say_compiling("once for all images")
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == (
        "one of two images\n"
        "preparing the model; a first run compiles encoder and decoder, once for all images ...\n"
    )
