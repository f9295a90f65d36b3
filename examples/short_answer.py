"""A reward that any run can start with: complete, on-topic answers in few words, without repetition.

Copy this file and change it. `score` is called with the arguments it names: `prompt` and `response` are text,
`finished` says whether the answer came to its end, and any column of your prompt data can be named as well.
Use it with `rollout.reward: examples.short_answer.score`, or by file: `examples/short_answer.py:score`.
"""

import re

FEW_WORDS = 20  # full marks up to here ...
MANY_WORDS = 60  # ... and none from here on
COMMON_WORDS = set(
    """
    about after also because been before could does doing each ever every from give have having here into just like
    make many more most much need only other over please same should some such tell than that their them then there
    these they thing things this those very want well were what when where which while will with word words would
    write your yours sentence sentences short simple explain describe list name
    """.split()  # noqa: SIM905 - a list of strings would fill the page
)


def score(prompt: str, response: str, finished: bool) -> float:
    """A number from 0 to 1: the product of five parts, so that an answer has to be good in all of them.

    An empty answer, a cut one, one that repeats itself, one that says nothing on the subject and one that only
    repeats the question all lose.
    """
    words = re.findall(r"[a-z0-9']+", response.lower())
    if len(words) < 3:
        return 0.0
    complete = 1.0 if finished and response.strip()[-1] in ".!?\"')" else 0.25
    brief = min(1.0, max(0.0, (MANY_WORDS - len(words)) / (MANY_WORDS - FEW_WORDS)))
    fresh = len(set(words)) / len(words)
    return complete * (0.1 + 0.9 * brief) * fresh * on_topic(prompt, words) * own_words(prompt, words)


def stems(words: list[str]) -> set[str]:
    """The first five letters of the words that carry meaning: "explain" and "explained" count as one."""
    return {word[:5] for word in words if len(word) > 3 and word not in COMMON_WORDS}


def on_topic(prompt: str, words: list[str]) -> float:
    """From 0.5 for no word of the subject to 1 for two of them, or for all if there are fewer."""
    subject = stems(re.findall(r"[a-z0-9']+", prompt.lower()))
    wanted = min(2, len(subject))
    return 1.0 if wanted == 0 else 0.5 + 0.5 * min(1.0, len(subject & stems(words)) / wanted)


def own_words(prompt: str, words: list[str]) -> float:
    """1 if at least a third of the answer's words are not the prompt's, falling to 0 for a mere copy."""
    asked = set(re.findall(r"[a-z0-9']+", prompt.lower()))
    return min(1.0, 3 * sum(word not in asked for word in words) / len(words))
