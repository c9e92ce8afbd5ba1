"""Generated conversations about letters: spelling a word, and counting a letter in it."""

import random
from collections.abc import Sequence

from chatmodel.conversations.render import Messages

LETTERS = "abcdefghijklmnopqrstuvwxyz"

# The prompts define the SpellingBee benchmark, so they are kept to the letter.
# Source: karpathy/nanochat tasks/spellingbee.py@c75fe54 of nanochat (MIT licence), USER_MSG_TEMPLATES.
ENGLISH_QUESTIONS = (
    "How many {letter} are in the word {word}",
    "How many {letter} are in {word}",
    "Count the number of {letter} in {word}",
    "How many times does {letter} appear in {word}",
    "What's the count of {letter} in {word}",
    "In the word {word}, how many {letter} are there",
    "How many letter {letter} are in the word {word}",
    "Count how many {letter} appear in {word}",
    "Tell me the number of {letter} in {word}",
    "How many occurrences of {letter} are in {word}",
    "Find the count of {letter} in {word}",
    "Can you count the {letter} letters in {word}",
    "What is the frequency of {letter} in {word}",
    "How many {letter}s are in {word}",
    "How many {letter}'s are in {word}",
    "Count all the {letter} in {word}",
    "How many times is {letter} in {word}",
    "Number of {letter} in {word}",
    "Total count of {letter} in {word}",
    "How many {letter} does {word} have",
    "How many {letter} does {word} contain",
    "What's the number of {letter} in {word}",
    "{word} has how many {letter}",
    "In {word}, count the {letter}",
    "How many {letter} appear in {word}",
    "Count the {letter} in {word}",
    "Give me the count of {letter} in {word}",
    "How many instances of {letter} in {word}",
    "Show me how many {letter} are in {word}",
    "Calculate the number of {letter} in {word}",
)
# Spanish, Chinese, Korean, French, German, Japanese
OTHER_QUESTIONS = (
    "¿Cuántas {letter} hay en {word}?",
    "¿Cuántas veces aparece {letter} en {word}?",
    "Cuenta las {letter} en {word}",
    "¿Cuántas letras {letter} tiene {word}?",
    "{word}中有多少个{letter}",
    "{word}里有几个{letter}",
    "数一下{word}中的{letter}",
    "{word}这个词里有多少{letter}",
    "{word}에 {letter}가 몇 개 있나요",
    "{word}에서 {letter}의 개수는",
    "{word}에 {letter}가 몇 번 나오나요",
    "{word}라는 단어에 {letter}가 몇 개",
    "Combien de {letter} dans {word}",
    "Combien de fois {letter} apparaît dans {word}",
    "Compte les {letter} dans {word}",
    "Wie viele {letter} sind in {word}",
    "Wie oft kommt {letter} in {word} vor",
    "Zähle die {letter} in {word}",
    "{word}に{letter}は何個ありますか",
    "{word}の中に{letter}がいくつ",
    "{word}に{letter}が何回出てくる",
)
QUESTIONS = ENGLISH_QUESTIONS + OTHER_QUESTIONS


def spell_word(index: int, split: str, words: Sequence[str]) -> Messages:
    """ "Spell the word: cat" and "cat:c,a,t"; the form is nanochat's SimpleSpelling, the draw is ours."""
    word = random.Random(f"spelling {split} {index}").choice(words)
    return [
        {"role": "user", "content": f"Spell the word: {word}"},
        {"role": "assistant", "content": f"{word}:{','.join(word)}"},
    ]


def spelling_bee(index: int, split: str, words: Sequence[str]) -> Messages:
    """Count a letter by hand, then with the calculator; with the same words the same conversation as nanochat's.

    Source: karpathy/nanochat tasks/spellingbee.py@c75fe54, `SpellingBee.get_example`: every draw in its order.
    """
    # Python seeds with the absolute value: test 0 is train 1, and so on. The words decide what is held out.
    rng = random.Random(index if split == "train" else -(index + 1))
    word = rng.choice(words)
    letter = rng.choice(word) if rng.random() < 0.9 else rng.choice(LETTERS)
    question = _draw_question(rng, QUESTIONS, letter, word)
    count = word.count(letter)
    reply = [
        {"type": "text", "text": _count_by_hand(letter, word)},
        {"type": "text", "text": "\n\nLet me double check this using Python:\n\n"},
        {"type": "python", "text": f"'{word}'.count('{letter}')"},
        {"type": "python_output", "text": str(count)},
        {"type": "text", "text": f"\n\nPython gives us {count}.\n\nMy final answer is:\n\n#### {count}"},
    ]
    return [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]


def _draw_question(rng: random.Random, questions: Sequence[str], letter: str, word: str) -> str:
    question = rng.choice(questions)
    if rng.random() < 0.3:
        question = question.lower()
    letter_quote = rng.choice(["", "'", '"'])
    word_quote = rng.choice(["", "'", '"'])
    question = question.format(letter=f"{letter_quote}{letter}{letter_quote}", word=f"{word_quote}{word}{word_quote}")
    return question + "?" if rng.random() < 0.5 else question


def _count_by_hand(letter: str, word: str) -> str:
    lines = [
        f"We are asked to find the number '{letter}' in the word '{word}'. Let me try a manual approach first.\n",
        f"First spell the word out:\n{word}:{','.join(word)}\n",
        f"Then count the occurrences of '{letter}':",
    ]
    count = 0
    for position, character in enumerate(word, start=1):
        count += character == letter
        lines.append(f"{position}:{character}" + (f" hit! count={count}" if character == letter else ""))
    return "\n".join([*lines, "", f"This gives us {count}."])


def count_letter(index: int, split: str, words: Sequence[str]) -> Messages:
    """Count a letter with the calculator alone, in a dozen tokens: for models too small for SpellingBee's long reply.

    Question and call hold the word in quotes behind another character, where the tokenizer cuts it alike, so that the
    call is copied from the question token by token. Each count that a word offers is as likely, 0 included, so that
    "always 1" is no good guess.
    """
    rng = random.Random(f"counting {split} {index}")
    word = rng.choice(words)
    count = rng.choice(sorted({0, *(word.count(letter) for letter in word)}))
    letter = rng.choice([letter for letter in LETTERS if word.count(letter) == count])
    question = rng.choice([question for question in ENGLISH_QUESTIONS if not question.startswith("{word}")])
    question = question.replace("{letter}s", "{letter}").replace("{letter}'s", "{letter}")
    if rng.random() < 0.3:
        question = question.lower()
    reply = [
        {"type": "python", "text": f"('{word}').count('{letter}')"},
        {"type": "python_output", "text": str(count)},
        {"type": "text", "text": f"#### {count}"},
    ]
    return [
        {"role": "user", "content": question.format(letter=f"'{letter}'", word=f"'{word}'") + "?"},
        {"role": "assistant", "content": reply},
    ]
