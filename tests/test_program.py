"""`python -m ilora`: the report, the self-test and the short benchmark."""

import pytest
import torch

import ilora
from ilora import __main__ as program
from ilora.op import backends


def test_the_report_says_what_works_here_and_why_not(capsys, monkeypatch):
    monkeypatch.setenv("ILORA_STRATEGY", "beta")
    assert program.main([]) == 0
    text = capsys.readouterr().out
    for wanted in (
        f"ilora {ilora.__version__}",
        f"torch {torch.__version__}",
        "reference  cpu   works",
        "ILORA_STRATEGY=beta",
    ):
        assert wanted in text
    for name in backends.NAMES:
        reason = backends.why_not(name, "cpu")
        assert reason is None or reason in text


def test_the_self_test_passes_for_every_backend_that_works_here(capsys):
    assert program.main(["check"]) == 0
    text = capsys.readouterr().out
    assert [name for name in backends.NAMES if f"{name:10} cpu" in text] == list(ilora.available_backends("cpu"))
    assert "WRONG" not in text


def shifted(real, output):
    """The operation with one of its results a little wrong."""

    class Shift(torch.autograd.Function):
        @staticmethod
        def forward(ctx, tensor):
            return tensor.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * 1.01

    def call(x, weight, bias, A, B, gate, *settings, **named):
        if output == "y":
            return real(x, weight, bias, A, B, gate, *settings, **named) * 1.01
        changed = {"dx": x, "dA": A, "dB": B, "dgate": gate}
        changed[output] = Shift.apply(changed[output])
        return real(changed["dx"], weight, bias, changed["dA"], changed["dB"], changed["dgate"], *settings, **named)

    return call


@pytest.mark.parametrize("output", ["y", "dx", "dA", "dB", "dgate"])
def test_the_self_test_finds_a_wrong_result(output, monkeypatch, capsys):
    monkeypatch.setattr(ilora, "ilora_linear", shifted(ilora.ilora_linear, output))
    monkeypatch.setattr(program, "DTYPES", (torch.float32,))
    assert program.main(["check"]) == 1
    assert f"{output} is off by" in capsys.readouterr().out


def test_nan_is_wrong(monkeypatch):
    monkeypatch.setattr(
        ilora,
        "ilora_linear",
        lambda x, *more, **named: (
            x.sum() * more[2].sum() * more[3].sum() * more[4].sum() * torch.full((x.shape[0], 40), torch.nan)
        ),
    )
    assert [well for _, well in program.check()].count(True) == 0


def test_the_short_benchmark_times_all_three(monkeypatch):
    monkeypatch.setattr(program, "SHAPES", dict.fromkeys(("cpu", "cuda"), ((8, 8, 2),)))
    lines = list(program.bench())
    assert len(lines) == 3
    for name in ("frozen", "torch", "ilora"):
        assert f"{name} " in lines[1]


def test_an_unknown_job_is_refused(capsys):
    with pytest.raises(SystemExit):
        program.main(["test"])
    assert "report" in capsys.readouterr().err
