import pytest

import main
from training import train


@pytest.mark.parametrize(
    ("arguments", "model", "epochs", "verbose"),
    [
        (["-v", "ntm"], "ntm", None, True),
        (["lstm"], "lstm-stack", None, False),
        (["dense", "-e", "7"], "dense", 7, False),
        (["ntm", "-c", "lstm"], "ntm-lstm", None, False),
        (
            ["--ntm_controller_architecture", "double_dense", "--verbose", "--epochs", "3", "ntm"],
            "ntm-double-dense",
            3,
            True,
        ),
    ],
)
def test_the_ancestors_command_line_means_what_it_meant(arguments, model, epochs, verbose):
    options = train.parser().parse_args(main.translated(main.parser().parse_args(arguments)))
    assert (options.task, options.model) == ("copy", model)
    assert (options.epochs, options.verbose, options.no_export) == (epochs, verbose, True)


def test_a_bad_option_is_refused(capsys):
    assert main.main(["-e", "0", "ntm"]) == 2
    assert "epochs should be" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main.main(["gru"])
