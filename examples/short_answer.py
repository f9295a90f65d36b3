"""A simple reward to start with: complete, on-topic responses in few words, without repetition.

Copy this file and change it. `score` is called with the arguments that it names: `prompt` and `response` are text,
`finished` is False for a truncated response, and other arguments are columns of your prompt data.
Use it with `rollout.reward: examples.short_answer.score`, or by file: `examples/short_answer.py:score`.
"""

import re

FEW_WORDS = 20  # up to this length, brevity scores 1 ...
MANY_WORDS = 60  # ... and from this length on, 0
COMMON_WORDS = set(
    """
    about after also because been before could does doing each ever every from give have having here into just like
    make many more most much need only other over please same should some such tell than that their them then there
    these they thing things this those very want well were what when where which while will with word words would
    write your yours sentence sentences short simple explain describe list name
    """.split()  # noqa: SIM905 - a list of strings would be long
)


def score(prompt: str, response: str, finished: bool) -> float:
    """A score from 0 to 1: the product of five parts, so that a response must be good in all of them.

    Empty, truncated, repetitive and off-topic responses, and copies of the prompt, score low.
    """
    words = re.findall(r"[a-z0-9']+", response.lower())
    if len(words) < 3:
        return 0.0
    complete = 1.0 if finished and response.strip()[-1] in ".!?\"')" else 0.25
    brief = min(1.0, max(0.0, (MANY_WORDS - len(words)) / (MANY_WORDS - FEW_WORDS)))
    varied = len(set(words)) / len(words)
    topical, original = score_topic(prompt, words), score_originality(prompt, words)
    return complete * (0.1 + 0.9 * brief) * varied * topical * original


def stems(words: list[str]) -> set[str]:
    """The first five letters of the content words, so that "explain" and "explained" are the same."""
    return {word[:5] for word in words if len(word) > 3 and word not in COMMON_WORDS}


def score_topic(prompt: str, words: list[str]) -> float:
    """From 0.5 for none of the prompt's content words to 1 for two of them, or for all if there are fewer."""
    subject = stems(re.findall(r"[a-z0-9']+", prompt.lower()))
    required = min(2, len(subject))
    return 1.0 if required == 0 else 0.5 + 0.5 * min(1.0, len(subject & stems(words)) / required)


def score_originality(prompt: str, words: list[str]) -> float:
    """1 if at least a third of the response's words are not in the prompt, falling to 0 if all are."""
    prompt_words = set(re.findall(r"[a-z0-9']+", prompt.lower()))
    return min(1.0, 3 * sum(word not in prompt_words for word in words) / len(words))
