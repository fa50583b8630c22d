"""What the example-like scripts share: data from JSON lines, and TrainingArguments as the examples leave them.

The scripts here are written in the way of the example scripts of Hugging Face transformers (examples/pytorch: text-classification/run_glue.py and run_xnli.py,
token-classification/run_ner.py, question-answering/run_qa.py with trainer_qa.py and utils_qa.py), which most studies start from: data through `datasets.map`, training and
prediction through `transformers.Trainer`. `--pad_to_max_length true` is how they ship; `false` and `--train_sampling_strategy group_by_length` are how a careful user tunes them.
"""

import argparse
import secrets

from datasets import load_dataset
from transformers import Trainer, TrainingArguments


def mapped(dataset, encode):
    """`dataset.map` as the examples call it, but without the fingerprint that names its cache: to hash a large tokenizer takes a second, which a script spends once per data set of thousands of rows and a benchmark of a few rows would count against it."""
    return dataset.map(encode, batched=True, remove_columns=dataset.column_names, new_fingerprint=secrets.token_hex(8))


def parser(description):
    """The options that all scripts have, with the examples' defaults."""
    found = argparse.ArgumentParser(description=description)
    found.add_argument("--model_name_or_path", required=True)
    found.add_argument("--train_file", help="JSON lines; without it nothing is trained")
    found.add_argument("--test_files", nargs="*", default=[], help="JSON lines, one file per language; each is predicted and scored")
    found.add_argument("--output_dir", required=True)
    found.add_argument("--max_seq_length", type=int, default=128)
    found.add_argument("--pad_to_max_length", choices=("true", "false"), default="true")
    found.add_argument("--train_sampling_strategy", choices=("random", "group_by_length"), default="random")
    found.add_argument("--per_device_train_batch_size", type=int, default=32)
    found.add_argument("--per_device_eval_batch_size", type=int, default=8)
    found.add_argument("--learning_rate", type=float, default=2e-5)
    found.add_argument("--num_train_epochs", type=float, default=1.0)
    found.add_argument("--seed", type=int, default=42)
    return found


def training_arguments(folder, batch=32, evaluation_batch=8, learning_rate=2e-5, epochs=1.0, strategy="random", seed=42, **others):
    """Arguments of a Trainer on the processor, with the defaults of the library otherwise."""
    return TrainingArguments(output_dir=str(folder), per_device_train_batch_size=batch, per_device_eval_batch_size=evaluation_batch, learning_rate=learning_rate, num_train_epochs=epochs,
                             train_sampling_strategy=strategy, seed=seed, use_cpu=True, dataloader_pin_memory=False, disable_tqdm=True, report_to="none", **others)


def arguments_of(options):
    """Arguments of a Trainer from the command line."""
    return training_arguments(options.output_dir, options.per_device_train_batch_size, options.per_device_eval_batch_size, options.learning_rate, options.num_train_epochs,
                              options.train_sampling_strategy, options.seed)


def read(path):
    """A data set of JSON lines."""
    return load_dataset("json", data_files=str(path), split="train")


class QuietTrainer(Trainer):
    """A Trainer that does not print its logs; printing is no part of the comparison."""

    def log(self, logs, *args, **kwargs):
        self.state.log_history.append({**logs, "step": self.state.global_step})
