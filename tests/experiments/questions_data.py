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
    choice("What melts in the sun?", 2, "a stone", "a road", "the snow on a roof", "a map of the north"),
]
FIVE = [
    choice(" Where do bees live? ", 1, "a map", "a hive", "a shoe", "a well", "a book"),
    choice("What is worn on a foot?", 3, "honey", "rain", "a hat", "a shoe", "steel"),
    choice("What has pages?", 4, "a roof", "a star", "a jar", "a fox", "a book"),
]
ENDINGS = ["runs.", "melts.", "rusts.", "rains."]
LONG = "Rain -- " + " ".join(f"In year {year} it rained on {year % 7} days." for year in range(1901, 1931))
FILES = {
    **{
        f"{name}/{split}.jsonl": rows
        for name in ("arc_easy", "arc_challenge", "openbookqa")
        for split, rows in {"train": CHOICES[1:], "validation": CHOICES[:1], "test": CHOICES}.items()
    },
    "commonsense_qa/train.jsonl": FIVE[1:],
    "commonsense_qa/validation.jsonl": FIVE[:2],
    "boolq/train.jsonl": [
        claim("is ice cold", "Ice -- Ice is frozen water.", True),
        claim("is fire wet", "Fire -- Fire is hot.", False),
    ],
    "boolq/validation.jsonl": [
        claim("is the sun a star", "Sun -- The Sun is a star.", True),
        claim("do stones float", "Stone -- Most stones sink\u2028in water.", False),
        claim("was it dry in 1907", LONG, True),
    ],
    "lambada/lambada_openai_test.jsonl": [
        {"context": "She opened the door and saw the", "continuation": "cat"},
        {"context": "He read the last page and closed the", "continuation": "book"},
        {"context": "The bees flew home to the", "continuation": "hive"},
    ],
    "piqa/train.jsonl": [
        {"goal": "open a jar", "sol1": "turn its lid", "sol2": "sing to it"},
        {"goal": "wash a shoe", "sol1": "burn it", "sol2": "brush it"},
    ],
    "piqa/valid.jsonl": [
        {"goal": "dry a towel", "sol1": "drown it", "sol2": "hang it up"},
        {"goal": "melt ice", "sol1": "put it in the sun ", "sol2": "put it in the snow"},
    ],
    "hellaswag/fewshot_train_5.jsonl": [{"text": "Baking: A man mixes dough. He bakes a loaf."}],
    "hellaswag/validation.jsonl": [
        {"id": 0, "query": "Running: A girl ties her shoes. She", "choices": ENDINGS, "gold": 0},
        {"id": 1, "query": "Rain: The clouds grow. It", "choices": ENDINGS[::-1], "gold": 0},
    ],
    "webquestions/trainmodel.jsonl": [
        {"qId": "0", "qText": "who has the red book?", "answers": ["Tom", "Ann"]},
        {"qId": "1", "qText": "who wrote the letter?", "answers": ["Ann"]},
    ],
    "webquestions/test.jsonl": [
        {"qId": "2", "qText": "where is the fox?", "answers": ["the forest", "the den", "the"]}
    ],
    "triviaqa/triviaqa_sm_sub_3000.jsonl": [
        {"context": f"Question: {asked}?\nAnswer:", "answer": said, "aliases": [said, said.lower()]}
        for asked, said in {"Who lives in a hive": "Bees", "What is frozen water": "Ice"}.items()
    ],
    "squad_v1.1/train_fewshot_1000.jsonl": [
        {
            "title": name,
            "context": f"{name} is {said}.",
            "question": f"What is {name.lower()}?",
            "answers": [said],
            "id": name[0].lower(),
        }
        for name, said in {"Ice": "cold", "Tea": "hot"}.items()
    ],
    "nq_open/NQ-open.efficientqa.dev.1.1.jsonl": [
        {"question": "who has a hat", "answer": ["Tom"]},
        {"question": "what is red", "answer": ["the fox", "fox"]},
    ],
    "nq_open/NQ-open.dev.jsonl": [
        {"question": "what is blue", "answer": ["the sky", "sky"]},
        {"question": "which day is it in the north", "answer": ["Monday"]},
    ],
}
QUESTION = {"id": "m", "question": "What is white?", "answers": [{"text": "Milk", "answer_start": 0}]}
PARAGRAPH = {"context": "Milk is white. It comes from cows.", "qas": [QUESTION]}
SQUAD = {"data": [{"title": "Milk", "paragraphs": [PARAGRAPH]}]}
WHOLE = "The first line of a text.\n" + "".join(f"And line {i}, a little longer.\n" for i in range(60))


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
    for name, labels in (("train", "0\n1\n"), ("valid", "1\n0\n")):
        (folder / f"piqa/{name}-labels.lst").write_text(labels)
    (folder / "squad_v1.1/dev-v1.1.json").write_text(json.dumps(SQUAD))
    (folder / "wikitext2").mkdir()
    (folder / "wikitext2/test.raw.txt").write_text(WHOLE)
    return folder
