"""The fast encoder gives the tokenizer's own ids, and leaves foreign tokenizers to themselves."""

from pydoc_data.topics import topics

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from chatmodel.evaluation.encoding import SAMPLE, PromptEncoder
from chatmodel.evaluation.scoring import encode_texts


def test_ids_are_the_tokenizers_own(tokenizer):
    texts = [*list(topics.values())[:90], "", SAMPLE, "<|user_start|> is text", "a\n\nb", "\ud800 alone"]
    encoder = PromptEncoder(tokenizer)
    assert encoder.encoding is not None
    ids = encoder.encode(texts)
    assert [list(each) for each in ids[:-1]] == encode_texts(tokenizer, texts[:-1])
    assert len(ids) == len(texts)


def test_a_foreign_tokenizer_encodes_by_itself():
    backend = Tokenizer(models.WordLevel({"<bos>": 0, "the": 1, "sky": 2}, unk_token="the"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    encoder = PromptEncoder(PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>"))
    assert encoder.encoding is None
    assert [list(ids) for ids in encoder.encode(["the sky", ""])] == [[0, 1, 2], [0]]
