from examples.short_answer import score

PROMPT = "Why do cats purr?"
GOOD = "Cats purr when they are calm or want comfort, using fast movements of the throat."


def test_a_good_response_wins() -> None:
    assert score(PROMPT, GOOD, True) > 0.9


def test_degenerate_responses_lose() -> None:
    long = GOOD + " " + " ".join(f"Another{i} remark{i} follows{i}." for i in range(30))
    for response, finished in [
        ("", True),
        ("   ", True),
        ("Yes.", True),
        (GOOD, False),
        (PROMPT, True),
        ("cats purr " * 20 + ".", True),
        ("I am glad to be of some assistance today.", True),
        (long, True),
    ]:
        assert score(PROMPT, response, finished) < 0.6 * score(PROMPT, GOOD, True), response


def test_score_stays_between_0_and_1() -> None:
    for response in (GOOD, "", "7.", "!!! ???", "word " * 300, "数学は楽しい"):
        assert 0.0 <= score(PROMPT, response, True) <= 1.0
