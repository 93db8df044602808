"""What the task files beside this one cannot say in YAML."""

import collections
import re
import string


def shortest_answers(doc: dict) -> list[str]:
    """Accepted answers without those that begin with another one, which is said before they are."""
    kept: list[str] = []
    for answer in sorted(doc["answers"]):
        if not (kept and answer.startswith(kept[-1])):
            kept.append(answer)
    return kept


def all_answers(doc: dict) -> list[int]:
    """Every one of `shortest_answers` is right."""
    return list(range(len(shortest_answers(doc))))


def first_answer(doc: dict) -> str:
    """What a few-shot example shows."""
    return shortest_answers(doc)[0]


def first_squad_answer(doc: dict) -> str:
    """What a few-shot example shows."""
    return doc["answers"][0]


def squad_scores(doc: dict, results: list[str]) -> dict[str, float]:
    """Exact match and F1 of words against the best of a question's answers.

    Source: Rajpurkar et al. 2016, SQuAD (arXiv 1606.05250), section 6.1.
    """
    said = _words(results[0])
    answers = [_words(answer) for answer in doc["answers"]]
    return {
        "exact_match": float(any(said == answer for answer in answers)),
        "f1": max(_f1(said, answer) for answer in answers),
    }


def _words(text: str) -> list[str]:
    """Lower-case words without punctuation and articles."""
    text = "".join(char for char in text.lower() if char not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def _f1(said: list[str], answer: list[str]) -> float:
    shared = sum((collections.Counter(said) & collections.Counter(answer)).values())
    return 2 * shared / (len(said) + len(answer)) if shared else float(said == answer)


def perplexities(doc: dict, results: list[float]) -> dict[str, tuple[float, int]]:
    """The log-likelihood of a text against its words, ends of line among them, and against its bytes."""
    (log_likelihood,) = results
    words = len(doc["text"].split()) + doc["text"].count("\n")
    return {
        "word_perplexity": (log_likelihood, words),
        "bits_per_byte": (log_likelihood, len(doc["text"].encode())),
    }
