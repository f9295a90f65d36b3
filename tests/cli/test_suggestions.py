import pytest

from rlhf_pl.cli.suggestions import explain

NO_CLASS = """Parser key "trainer.logger":

  - Expected a path but {0} either not accessible or invalid
  - Does not validate against any of the Union subtypes
  Errors:
    - Expected a dot import path string: {0}
    - Expected a <class 'bool'>
  Given value: {0}"""


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        ("CSVLoger", ". Did you mean CSVLogger?"),
        ("lora", ". Did you mean LoRA?"),
        ("VLLM", ". Did you mean VLLMSampler or VLLMServerSampler?"),
        ("Zzz", ""),
    ],
)
def test_an_unknown_class_is_named_with_those_like_it(wrong: str, hint: str) -> None:
    assert explain(NO_CLASS.format(wrong)) == f"`trainer.logger`: there is no class '{wrong}'{hint}"


@pytest.mark.parametrize(
    ("message", "meant"),
    [
        ("Option 'lr' is not accepted", "--model.optimizer.lr"),
        ("Option 'etta' is not accepted", "--model.loss.eta"),
        ("Option 'optimiser.lr' is not accepted", "--model.optimizer.lr"),
        ("unrecognized arguments: --rollout.samplng.top_p 0.9", "--rollout.sampling.top_p"),
        ("unrecognized arguments: --repeir", "--repair"),
    ],
)
def test_an_unknown_option_is_shown_with_those_like_it(message: str, meant: str) -> None:
    assert explain(message) == f"{message}. Did you mean {meant}?"


@pytest.mark.parametrize("message", ["Option 'zzzz' is not accepted", 'Parser key "batch_size":\n  Expected an int'])
def test_other_messages_are_kept(message: str) -> None:
    assert explain(message) == message
