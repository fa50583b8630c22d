"""The same weights on both sides: a peer's classifier with this package's encoder and head, and Trainer's loop over given batches."""

import torch
from common import training_arguments
from torch.utils.data import Dataset, SequentialSampler
from transformers import AutoConfig, AutoModelForSequenceClassification, DataCollatorWithPadding, Trainer


def peer_classifier(model, task, checkpoint, labels):
    """The library's classifier of a checkpoint with the weights of our encoder and head (families whose classifier is dense, tanh, linear: XLM-R, RoBERTa, BERT)."""
    found = AutoModelForSequenceClassification.from_pretrained(checkpoint, config=AutoConfig.from_pretrained(checkpoint, num_labels=labels))
    encoder, head = getattr(found, found.base_model_prefix), model.heads[task]
    encoder.load_state_dict(model.encoder.state_dict(), strict=False)
    dense, out = (found.classifier.dense, found.classifier.out_proj) if hasattr(found.classifier, "out_proj") else (encoder.pooler.dense, found.classifier)
    dense.load_state_dict(head.dense.state_dict()), out.load_state_dict(head.out.state_dict())
    return found


class Rows(Dataset):
    """Token ids with labels."""

    def __init__(self, ids, labels):
        self.ids, self.labels = ids, labels

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        return {"input_ids": self.ids[i], "attention_mask": [1] * len(self.ids[i]), "labels": self.labels[i]}


class OrderedTrainer(Trainer):
    """A Trainer that goes through its rows as they come, and notes each loss with all its digits."""

    def _get_train_sampler(self, *args, **kwargs):
        return SequentialSampler(self.train_dataset)

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.losses.append(loss.item())
        return loss

    def log(self, logs, *args, **kwargs):
        pass


def trainer_losses(model, tokenizer, batches, labels, rates, recipe, folder):
    """The loss of each update of Trainer on given batches with given learning rates."""
    arguments = training_arguments(folder, batch=len(batches[0]), learning_rate=recipe.learning_rate, save_strategy="no", max_grad_norm=recipe.max_grad_norm)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, eps=recipe.adam_epsilon, weight_decay=recipe.weight_decay, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rates[min(step, len(rates) - 1)] / recipe.learning_rate)
    rows = Rows([ids for batch in batches for ids in batch], [label for batch in labels for label in batch])
    trainer = OrderedTrainer(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer, data_collator=DataCollatorWithPadding(tokenizer), optimizers=(optimizer, schedule))
    trainer.losses = []
    trainer.train()
    return trainer.losses
