"""Extractive question answering in the way of run_qa.py."""

import json
import sys

from answers import find_answers
from common import QuietTrainer, arguments_of, mapped, parser, read
from transformers import AutoModelForQuestionAnswering, AutoTokenizer, DataCollatorWithPadding, default_data_collator

STRIDE = 128


def windows_of(rows, tokenizer, max_length, pad):
    """Windows over the contexts of some rows, each with the whole question."""
    return tokenizer(rows["question"], rows["context"], truncation="only_second", max_length=max_length, stride=min(STRIDE, max_length // 4), return_overflowing_tokens=True, return_offsets_mapping=True,
                     padding="max_length" if pad else False)


def preprocess_train(dataset, tokenizer, max_length, pad):
    """Windows with the first and the last token of the answer, or the first token of all where it is not in the window."""
    def encode(rows):
        found = windows_of(rows, tokenizer, max_length, pad)
        owner, offsets = found.pop("overflow_to_sample_mapping"), found.pop("offset_mapping")
        found["start_positions"], found["end_positions"] = [], []
        for i, covered in enumerate(offsets):
            sides = found.sequence_ids(i)
            answers, starts = rows["answers"][owner[i]], rows["starts"][owner[i]]
            first = last = 0
            if answers and starts[0] >= 0:
                begin, end = starts[0], starts[0] + len(answers[0])
                inside = [k for k, side in enumerate(sides) if side == 1]
                if inside and covered[inside[0]][0] <= begin and covered[inside[-1]][1] >= end:
                    first = max((k for k in inside if covered[k][0] <= begin), default=0)
                    last = min((k for k in inside if covered[k][1] >= end), default=0)
            found["start_positions"].append(first), found["end_positions"].append(last)
        return found
    return mapped(dataset, encode)


def preprocess_test(dataset, tokenizer, max_length, pad):
    """Windows with what is needed to turn tokens into text."""
    def encode(rows):
        found = windows_of(rows, tokenizer, max_length, pad)
        owner = found.pop("overflow_to_sample_mapping")
        found["example_id"] = [rows["id"][i] for i in owner]
        found["offset_mapping"] = [[o if side == 1 else None for o, side in zip(covered, found.sequence_ids(i))] for i, covered in enumerate(found["offset_mapping"])]
        return found
    return mapped(dataset, encode)


def predict(trainer, rows, windows):
    """The answer of each row by its id."""
    first, last = trainer.predict(windows.remove_columns(["example_id", "offset_mapping"])).predictions
    return find_answers(rows, windows, first, last)


def main(argv=None):
    options = parser(__doc__).parse_args(argv)
    pad = options.pad_to_max_length == "true"
    tokenizer = AutoTokenizer.from_pretrained(options.model_name_or_path)
    train = preprocess_train(read(options.train_file), tokenizer, options.max_seq_length, pad) if options.train_file else None
    trainer = QuietTrainer(model=AutoModelForQuestionAnswering.from_pretrained(options.model_name_or_path), args=arguments_of(options), train_dataset=train, processing_class=tokenizer,
                           data_collator=default_data_collator if pad else DataCollatorWithPadding(tokenizer))
    if train is not None:
        trainer.train()
        trainer.save_model()
    for path in options.test_files:
        rows = read(path)
        found = predict(trainer, rows, preprocess_test(rows, tokenizer, options.max_seq_length, pad))
        print(json.dumps({"file": path, "exact": sum(found[i] in answers for i, answers in zip(rows["id"], rows["answers"])) / len(rows)}))


if __name__ == "__main__":
    sys.exit(main())
