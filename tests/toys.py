"""A whole experiment in one file, as a user would write it: tasks of every format, a backbone and a study."""

import random

from xtransfer.backbones import BACKBONES, Backbone
from xtransfer.core import derive_seed
from xtransfer.studies import STUDIES, Contrast, Mixing, Recipe, Stage, Study, StudyDeclaration, intermediate_cells
from xtransfer.tasks import TASKS, Source, Task, choices_nested, mining_side, plain_text, sentence_pair, squad_columns, tagging, text_pair

LETTERS, LANGUAGES, SIZES = "abcdefgh", ("en", "de", "fr"), {"train": 90, "dev": 23, "test": 31}
FIELDS = {"license": "Apache-2.0", "note": "synthetic"}


def toy_tokenizer():
    """Every letter is a token, so that a word has one to four."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    pieces = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *LETTERS, *("##" + c for c in LETTERS), "?"]
    tokenizer = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", cls_token="<s>", sep_token="</s>", pad_token="<pad>", unk_token="<unk>",
                                   mask_token="<mask>", model_max_length=128, model_input_names=["input_ids", "attention_mask"])


def words(rng, low=1, high=9):
    """Some words of one to four letters."""
    return ["".join(rng.choice(LETTERS) for _ in range(rng.randint(1, 4))) for _ in range(rng.randint(low, high))]


def said(sentence, language):
    """The sentence in a toy language: the others spell backwards."""
    return [w if language == "en" else w[::-1] for w in sentence]


def rows(make):
    """A `load` function that draws rows by the seed of the language and split."""
    def load(language, split):
        rng = random.Random(derive_seed("toys", make.__name__, split))
        return [make(rng, language, split, i) for i in range(SIZES[split])]
    return load


def pair_row(rng, language, split, i):
    first, second = words(rng), words(rng)
    return {"id": f"{split}-{i}", "first": " ".join(said(first, language)), "second": " ".join(said(second, language)), "label": "yes" if "a" in "".join(first + second[:1]) else "no"}


def choice_row(rng, language, split, i):
    options, right = [words(rng, 1, 3) for _ in range(3)], rng.randrange(3)
    asked = rng.choice(options[right])
    return {"id": f"{split}-{i}", "question": " ".join(said([asked], language)), "choices": {"label": list("ABC"), "text": [" ".join(said(o, language)) for o in options]}, "answerKey": "ABC"[right]}


def tag_row(rng, language, split, i):
    tokens = words(rng, 1, 12)
    return {"id": f"{split}-{i}", "tokens": said(tokens, language), "tags": ["B-LONG" if len(w) > 2 else "O" for w in tokens]}


def question_row(rng, language, split, i, unanswerable=0.0):
    context = words(rng, 8, 20)
    at = rng.randrange(len(context))
    gone = rng.random() < unanswerable
    spoken = said(context, language)
    answers = {"text": [] if gone else [spoken[at]], "answer_start": [] if gone else [len(" ".join(spoken[:at])) + (at > 0)]}
    return {"id": f"{split}-{i}", "question": f"{spoken[at][0]} ?", "context": " ".join(spoken), "answers": answers}


def doubtful_row(rng, language, split, i):
    return question_row(rng, language, split, i, unanswerable=0.4)


def text_row(rng, language, split, i):
    sentence = words(rng, 2, 12)
    return {"id": f"{split}-{i}", "text": " ".join(sentence), "text_pair": " ".join(said(sentence, "de")) if i % 3 == 0 else ""}


def translation_row(rng, language, split, i):
    sentence = words(rng, 3, 9)
    return {"id": f"{split}-{i}", "english": " ".join(sentence), "foreign": " ".join(said(sentence, language))}


def mining_rows(language, split):
    rng, found = random.Random(derive_seed("mining", split)), []
    for i in range(SIZES[split]):
        sentence = words(rng, 3, 9)
        if i % 4:
            found.append({"id": f"x-{i}", "side": "source", "text": " ".join(said(sentence, language)), "match": f"en-{i}" if i % 4 > 1 else ""})
        if i % 4 != 1:
            found.append({"id": f"en-{i}", "side": "target", "text": " ".join(sentence), "match": ""})
    return found


def ranked_rows(language, split):
    """Sentences with their neighbours as context, and queries for them: two words that stand in the sentence. Two queries share every fifth sentence; in the test split all languages' sentences are right."""
    rng, found = random.Random(derive_seed("ranked", split)), []
    sentences = [words(rng, 3, 9) for _ in range(SIZES[split])]
    for i, sentence in enumerate(sentences):
        for number in range(1 + (i % 5 == 0)):
            asked = rng.sample(sentence, 2)
            answers = [f"{code}-{i}" for code in (LANGUAGES if split == "test" else (language,))]
            found.append({"id": f"q-{i}-{number}", "side": "query", "text": " ".join(said(asked, language)), "text_pair": "", "relevant": answers})
    for i, sentence in enumerate(sentences):
        context = " ".join(said(sentence + sentences[i - 1], language)) if i % 2 else ""
        found.append({"id": f"{language}-{i}", "side": "candidate", "text": " ".join(said(sentence, language)), "text_pair": context, "relevant": []})
    return found


def declare(name, format, make, read, **others):
    """Register one toy task."""
    trained = format not in ("retrieval", "bitext_mining")
    load = {"bitext_mining": mining_rows, "ranked_retrieval": ranked_rows}.get(format) or rows(make)
    languages = others.pop("languages", LANGUAGES if trained else LANGUAGES[1:])
    return TASKS.register(Task(name=name, format=format, kind=others.pop("kind", "toy"), source=Source(repo="generated", **FIELDS), languages=languages, load=load, read=read,
                               trains_on=name if trained else None, **others))


PAIR = declare("toy_pair", "sequence_classification", pair_row, text_pair("first", "second"), labels=("yes", "no"), metrics=("accuracy",), headline=("accuracy",))
CHOICE = declare("toy_choice", "multiple_choice", choice_row, choices_nested, metrics=("accuracy",), headline=("accuracy",))
TAGS = declare("toy_tags", "token_classification", tag_row, tagging(), labels=("O", "B-LONG"), metrics=("chunk_f1", "token_accuracy"), headline=("f1",))
QA = declare("toy_qa", "span_extraction", question_row, squad_columns, metrics=("squad",), headline=("exact_match", "f1"))
QA2 = declare("toy_qa2", "span_extraction", doubtful_row, squad_columns, metrics=("squad_v2",), headline=("exact_match", "f1"))
TEXT = declare("toy_text", "masked_lm", text_row, plain_text(), languages=("en",), kind="text")
RETRIEVAL = declare("toy_retrieval", "retrieval", translation_row, sentence_pair("english", "foreign"), metrics=("retrieval_accuracy",), headline=("accuracy",), kind="retrieval")
RANKED = declare("toy_ranked", "ranked_retrieval", None, dict, metrics=("map@20",), headline=("map@20",), kind="retrieval")
MINING = declare("toy_mining", "bitext_mining", None, mining_side, metrics=("pair_f1",), headline=("f1",), kind="retrieval")

BACKBONES.register(Backbone(
    name="toy-encoder", architecture="encoder", layers=2, hidden_size=16, retrieval_layer=1, max_length=128, build_tokenizer=toy_tokenizer,
    config={"model_type": "xlm-roberta", "num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 130,
            "type_vocab_size": 1, "layer_norm_eps": 1e-5, "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}))

RECIPE = Recipe(name="toy", learning_rate=3e-3, batch_size=8, max_steps=40, max_length=96, stride=8, evaluations=3, dev_limit=10)


def study(profile, arms, targets, untrained):
    """The toy study of one profile."""
    stages = {"none": (), "qa": (Stage(train=("toy_qa",), recipe=RECIPE, seed=0),),
              "multi": (Stage(train=("toy_qa2", "toy_choice", "toy_tags", "toy_text"), recipe=RECIPE, mixing=Mixing(kind="uniform"), seed=0),)}
    tagged = {"toy_retrieval": (Stage(train=("toy_tags",), recipe=RECIPE, seed=0),)}  # read from the model that was trained for the target toy_tags
    cells = intermediate_cells("toy-encoder", {a: stages[a] for a in arms}, {t: RECIPE for t in targets}, untrained, (0,), Stage(train=("toy_text",), recipe=RECIPE, seed=0), RECIPE, preparations=tagged)
    return Study(name="toys", profile=profile, question="Does a toy help?", cells=cells, contrasts=tuple(Contrast(treatment=a, baseline="none") for a in arms if a != "none"), distance="syntactic")


STUDIES.register(StudyDeclaration(name="toys", question="Does a toy help?", profiles={
    "smoke": lambda: study("smoke", ("none", "qa"), ("toy_pair",), ()),
    "mini": lambda: study("mini", ("none", "multi"), ("toy_tags", "toy_qa2", "toy_choice", "toy_ranked"), ("toy_retrieval", "toy_mining")),
}))
