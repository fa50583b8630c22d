"""Token classification in the way of run_ner.py."""

import json
import sys

import numpy as np
from common import QuietTrainer, arguments_of, mapped, parser, read
from transformers import AutoConfig, AutoModelForTokenClassification, AutoTokenizer, DataCollatorForTokenClassification

LABELS = ("O", "B-PER", "I-PER", "B-ORG", "I-ORG", "B-LOC", "I-LOC")


def preprocess(dataset, tokenizer, max_length, pad, labels=LABELS):
    """Tokenised words, with the tag at the first token of each word."""
    index = {label: i for i, label in enumerate(labels)}
    def encode(rows):
        encoded = tokenizer(rows["tokens"], padding="max_length" if pad else False, truncation=True, max_length=max_length, is_split_into_words=True)
        encoded["labels"] = []
        for i, tags in enumerate(rows["tags"]):
            words, before, found = encoded.word_ids(batch_index=i), None, []
            for word in words:
                found.append(-100 if word is None or word == before else index[tags[word]])
                before = word
            encoded["labels"].append(found)
        return encoded
    return mapped(dataset, encode)


def load_model(name, labels=LABELS, **config):
    """The model with a new head."""
    return AutoModelForTokenClassification.from_pretrained(name, config=AutoConfig.from_pretrained(name, num_labels=len(labels), **config))


def make_trainer(model, tokenizer, arguments, pad, train=None):
    """The Trainer that the example makes."""
    return QuietTrainer(model=model, args=arguments, train_dataset=train, processing_class=tokenizer, data_collator=DataCollatorForTokenClassification(tokenizer))


def predict(trainer, dataset):
    """The numbers of the tags of each row's words."""
    found = trainer.predict(dataset)
    tags = np.argmax(found.predictions, axis=2)
    return [[int(t) for t, label in zip(row, wanted) if label != -100] for row, wanted in zip(tags, found.label_ids)]


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
        rows = read(path)
        found = predict(trainer, preprocess(rows, tokenizer, options.max_seq_length, pad))
        right = [t == LABELS.index(w) for tags, wanted in zip(found, rows["tags"]) for t, w in zip(tags, wanted)]
        print(json.dumps({"file": path, "accuracy": float(np.mean(right))}))


if __name__ == "__main__":
    sys.exit(main())
