"""Sequence classification in the way of run_glue.py (training) and run_xnli.py (prediction, language by language)."""

import json
import sys

import numpy as np
from common import QuietTrainer, arguments_of, mapped, parser, read
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, default_data_collator

LABELS = ("entailment", "neutral", "contradiction")


def preprocess(dataset, tokenizer, max_length, pad, labels=LABELS, kept=False):
    """Tokenised pairs, padded here or in the batch; `kept` in the cache of the library, which hashes the tokenizer for it."""
    def encode(rows):
        encoded = tokenizer(rows["text"], rows["text_pair"], padding="max_length" if pad else False, max_length=max_length, truncation=True)
        encoded["label"] = [labels.index(label) for label in rows["label"]]
        return encoded
    return dataset.map(encode, batched=True, remove_columns=dataset.column_names) if kept else mapped(dataset, encode)


def load_model(name, labels=LABELS, **config):
    """The model with a new head."""
    return AutoModelForSequenceClassification.from_pretrained(name, config=AutoConfig.from_pretrained(name, num_labels=len(labels), **config))


def make_trainer(model, tokenizer, arguments, pad, train=None):
    """The Trainer that the examples make."""
    collator = default_data_collator if pad else DataCollatorWithPadding(tokenizer)
    return QuietTrainer(model=model, args=arguments, train_dataset=train, processing_class=tokenizer, data_collator=collator)


def predict(trainer, dataset):
    """The number of the label of each row."""
    return np.argmax(trainer.predict(dataset).predictions, axis=1)


def main(argv=None):
    options = parser(__doc__).parse_args(argv)
    pad = options.pad_to_max_length == "true"
    tokenizer = AutoTokenizer.from_pretrained(options.model_name_or_path)
    train = preprocess(read(options.train_file), tokenizer, options.max_seq_length, pad) if options.train_file else None
    trainer = make_trainer(load_model(options.model_name_or_path), tokenizer, arguments_of(options), pad, train)
    if train is not None:
        trainer.train()
        trainer.save_model()
    for path in options.test_files:
        test = preprocess(read(path), tokenizer, options.max_seq_length, pad)
        found = predict(trainer, test)
        print(json.dumps({"file": path, "accuracy": float((found == np.array(test["label"])).mean())}))


if __name__ == "__main__":
    sys.exit(main())
