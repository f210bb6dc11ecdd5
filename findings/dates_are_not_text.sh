#!/usr/bin/env bash
# Answers that are dates come out of load_dataset("json") as other texts, and whether they do depends on the other rows.
#
# Version     datasets 5.2.0, pyarrow 26.0.1, pandas 3.1.1.
# Expected    A JSON string is a text.  {"output": "1969-07-20"} is loaded, saved and loaded again as it stands, whatever the
#             other rows hold: JSON has no dates.
# Seen        If all outputs look like ISO dates, the column becomes timestamp[s]: an answer is
#             datetime.datetime(1969, 7, 20, 0, 0), and to_json writes the number -14256000000.  One "unknown" among them,
#             and they stay texts.  Worse with two files: the types come from the first split, so where train has an
#             "unknown" and test has dates alone, the column is a string as it should be, and test's answers are
#             "1969-07-20 00:00:00": nobody wrote that, and an exact match is lost.  The other way round it is an error
#             ("Failed to parse string").  "2024-05-01T10:00:00Z" loses its time zone.
#             features=Features({"output": Value("string"), ...}) does not help: the dates are parsed before they are cast.
# Meaning     For a task whose answers are dates, the model learns another text than the file's, or is scored against one.
#             Read the lines with Python's json and give them to Dataset.from_list, which keeps every text.
# Source      https://arrow.apache.org/docs/python/json.html (its type inference),
#             https://github.com/huggingface/course/issues/692 (the error, without its cause)
# Here        data/formats.py reads rows with Python's json, so a date is text (tests/plumbing/test_files.py).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q datasets==5.2.0 pyarrow==26.0.1 pandas==3.1.1 numpy==2.4.6
cd "$folder"
HF_HOME="$folder/cache" HF_DATASETS_OFFLINE=1 "$folder/venv/bin/python" - <<'PYTHON'
import datetime
import json

import datasets
from datasets import Features, Value, load_dataset

datasets.disable_progress_bars()
count = 0


def load(*columns, **options):
    """The outputs of one split for each list of outputs, loaded from a JSON-lines file each."""
    global count
    files = {}
    for split, outputs in zip(["train", "test"], columns):
        count += 1
        files[split] = f"rows{count}.jsonl"
        with open(files[split], "w") as file:
            file.writelines(json.dumps({"instruction": "When was it?", "output": text}) + "\n" for text in outputs)
    return load_dataset("json", data_files=files, **options)


print(f"datasets {datasets.__version__}")
dates = ["1969-07-20", "2024-05-01"]
alone = load(dates)["train"]
print("all are dates:", alone.features["output"].dtype, alone["output"][:])
alone.to_json("saved.jsonl")
saved = [json.loads(line)["output"] for line in open("saved.jsonl")]
print("saved again:", saved)
mixed = load([*dates, "unknown"])["train"]["output"][:]
print("with an 'unknown':", mixed)
zone = load(["2024-05-01T10:00:00Z"])["train"]["output"][:]
print("with a time zone:", zone)
splits = load(["unknown"], dates)
test = splits["test"]["output"][:]
print("train has 'unknown', test has dates:", splits["test"].features["output"].dtype, test)
try:
    load(dates, ["unknown"])
    error = "none"
except datasets.exceptions.DatasetGenerationError as e:
    error = str(e.__cause__)
print("the other way round:", error)
text = Features({"instruction": Value("string"), "output": Value("string")})
given = load(dates, features=text)["train"]["output"][:]
print("with features:", given)
kept = datasets.Dataset.from_list([json.loads(line) for line in open("rows1.jsonl")])["output"][:]
print("by from_list:", kept)
assert alone["output"][:] == [datetime.datetime(1969, 7, 20), datetime.datetime(2024, 5, 1)], "this has changed"
assert saved == [-14256000000, 1714521600000] and mixed == [*dates, "unknown"], "this has changed"
assert zone == [datetime.datetime(2024, 5, 1, 10)] and "Failed to parse string" in error, "this has changed"
assert test == given == [f"{date} 00:00:00" for date in dates] and kept == dates, "this has changed"
PYTHON
