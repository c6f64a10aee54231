from sam_jax.commands.common import say, say_compiling


def test_progress_is_not_output(capsys):
    """A program that reads what a command prints gets its results alone."""
    say("one of two images")
    say_compiling("once for all images")
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == (
        "one of two images\n"
        "preparing the model; a first run compiles encoder and decoder, once for all images ...\n"
    )
