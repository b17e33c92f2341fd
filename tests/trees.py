"""Folders full of somebody's files, and the hash of a whole tree."""

import hashlib
import json
import os
import random

NAMES = (
    *(
        "thesis.tex",
        "notes.txt",
        ".hidden",
        "config.json",
        "model.safetensors",
        "adapter_model.safetensors",
        "run.json",
    ),
    *("adapter_config.json", "memory.json", "manifest.json", "report.html", "report.json", "exposure_bias.json"),
    *(
        "dataset_dict.json",
        "trainer_state.json",
        "tokenizer.json",
        ".memdlm.json",
        "answers.jsonl",
        "training_args.bin",
    ),
)
FOLDERS = ("", "checkpoint-5", ".git", "train", "a/deep/er", "runs", "interrupted", ".saving", "checkpoints/mdlm-seed0")
TEXTS = ("years of work", "{", "{}", '{"format": 1}', json.dumps({"made_by": "me"}), "\x00\xff", '{"global_step": 5}')


def fill(folder, seed):
    """Put between one and twelve files into `folder`, drawn by `seed`; at least one lies at its top."""
    draw = random.Random(seed)
    folder.mkdir(parents=True)
    for number in range(draw.randint(1, 12)):
        place = folder / draw.choice(FOLDERS) if number else folder
        place.mkdir(parents=True, exist_ok=True)
        (place / draw.choice(NAMES)).write_text(draw.choice(TEXTS))
    return folder


def tree(folder):
    """{relative path: hash, link target or kind} of everything below `folder`."""
    found = {}
    for parent, names, files in os.walk(folder):
        for name in (*names, *files):
            path = os.path.join(parent, name)
            key = os.path.relpath(path, folder)
            if os.path.islink(path):
                found[key] = f"-> {os.readlink(path)}"
            elif os.path.isfile(path):
                with open(path, "rb") as file:
                    found[key] = hashlib.sha256(file.read()).hexdigest()
            else:
                found[key] = "folder" if os.path.isdir(path) else "special"
    return found
