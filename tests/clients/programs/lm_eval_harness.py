"""lm-eval's local-completions, on a task from local data: its log-probabilities by echo are the service's own."""
# /// script
# dependencies = ["lm-eval[api]>=0.4.9,<0.5", "transformers>=5.23,<6"]
# ///

import json
import os
import sys
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import lm_eval
from lm_eval.tasks import TaskManager

url, model, directory = sys.argv[1:]
rows = [
    {"question": "the whale and the", "choices": [" sea", " ship", " storm"], "answer": i % 3} for i in range(12)
] + [{"question": f"the ship {i} and", "choices": [" the sea", " whale"], "answer": 0} for i in range(12)]
TASK = """
task: whales
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
output_type: multiple_choice
test_split: test
doc_to_text: question
doc_to_choice: choices
doc_to_target: answer
target_delimiter: ""
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
with tempfile.TemporaryDirectory() as folder:
    data = Path(folder, "whales.jsonl")
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path(folder, "whales.yaml").write_text(TASK % data)
    os.environ["HF_DATASETS_CACHE"] = str(Path(folder, "cache"))
    found = lm_eval.simple_evaluate(
        model="local-completions",
        model_args={
            "model": model,
            "base_url": url + "/v1/completions",
            "tokenizer": directory,
            "num_concurrent": 4,
            "max_retries": 1,
            "max_length": 512,
        },
        tasks=["whales"],
        task_manager=TaskManager(include_path=folder, include_defaults=False),
        bootstrap_iters=0,
        log_samples=True,
    )
assert len(found["samples"]["whales"]) == 24
accuracy = found["results"]["whales"]["acc,none"]
samples = [
    {**sample["doc"], "logprobs": [float(response[0][0]) for response in sample["resps"]]}
    for sample in found["samples"]["whales"]
]
print(json.dumps({"accuracy": accuracy, "samples": samples}))
