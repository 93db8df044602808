"""Made-up questions in the forms that the task files read, and a folder of them."""

import json
import lzma
import pathlib


def choice(question: str, gold: int, *choices: str) -> dict:
    return {"id": question[:6], "question": question, "choices": list(choices), "gold": gold}


def claim(question: str, passage: str, answer: bool) -> dict:
    return {"question": question, "passage": passage, "answer": answer}


CHOICES = [
    choice("What do bees make?", 0, "honey", "bricks", "steel", "glass"),
    choice("Which of these is a colour?", 1, "seven", "green", "north"),
    choice("Where does rain come from?", 0, "clouds", "roads", "shoes", "maps"),
]
ENDINGS = ["runs.", "melts.", "rusts.", "rains."]
FILES = {
    "arc_easy/train.jsonl": CHOICES[1:],
    "arc_easy/validation.jsonl": CHOICES[:1],
    "arc_easy/test.jsonl": CHOICES[:2],
    "boolq/train.jsonl": [
        claim("is ice cold", "Ice -- Ice is frozen water.", True),
        claim("is fire wet", "Fire -- Fire is hot.", False),
    ],
    "boolq/validation.jsonl": [
        claim("is the sun a star", "Sun -- The Sun is a star.", True),
        claim("do stones float", "Stone -- Most stones sink\u2028in water.", False),
    ],
    "lambada/lambada_openai_test.jsonl": [
        {"context": "She opened the door and saw the", "continuation": "cat"},
        {"context": "He read the last page and closed the", "continuation": "book"},
    ],
    "piqa/train.jsonl": [{"goal": "open a jar", "sol1": "turn its lid", "sol2": "sing to it"}],
    "piqa/valid.jsonl": [{"goal": "dry a towel", "sol1": "drown it", "sol2": "hang it up"}],
    "hellaswag/fewshot_train_5.jsonl": [{"text": "Baking: A man mixes dough. He bakes a loaf."}],
    "hellaswag/validation.jsonl": [
        {"id": 0, "query": "Running: A girl ties her shoes. She", "choices": ENDINGS, "gold": 0}
    ],
    "webquestions/trainmodel.jsonl": [{"qId": "1", "qText": "who wrote the letter?", "answers": ["Ann"]}],
    "webquestions/test.jsonl": [
        {"qId": "2", "qText": "where is the fox?", "answers": ["the forest", "the den", "the"]}
    ],
    "squad_v1.1/train_fewshot_1000.jsonl": [
        {"title": "Tea", "context": "Tea is hot.", "question": "What is tea?", "answers": ["hot"], "id": "t"}
    ],
    "nq_open/NQ-open.efficientqa.dev.1.1.jsonl": [{"question": "who has a hat", "answer": ["Tom"]}],
    "nq_open/NQ-open.dev.jsonl": [{"question": "what is blue", "answer": ["the sky", "sky"]}],
}
QUESTION = {"id": "m", "question": "What is white?", "answers": [{"text": "Milk", "answer_start": 0}]}
PARAGRAPH = {"context": "Milk is white. It comes from cows.", "qas": [QUESTION]}
SQUAD = {"data": [{"title": "Milk", "paragraphs": [PARAGRAPH]}]}
WHOLE = "The first line of a text.\n" + "And here is another line, a little longer.\n" * 5


def write(folder: pathlib.Path) -> pathlib.Path:
    """The files, some of them packed."""
    for number, (name, rows) in enumerate(FILES.items()):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if number % 2:
            path.with_name(path.name + ".xz").write_bytes(lzma.compress(text.encode()))
        else:
            path.write_text(text, encoding="utf-8")
    for name, labels in (("train", "0\n"), ("valid", "1\n")):
        (folder / f"piqa/{name}-labels.lst").write_text(labels)
    (folder / "squad_v1.1/dev-v1.1.json").write_text(json.dumps(SQUAD))
    (folder / "wikitext2").mkdir()
    (folder / "wikitext2/test.raw.txt").write_text(WHOLE)
    return folder
