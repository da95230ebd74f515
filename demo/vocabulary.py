# SPDX-License-Identifier: Apache-2.0
"""The demo model's closed vocabulary: plain words, names, two-digit numbers and marks.

A token's id is its place in ``TOKENS``; changing any list here changes the ids, so a trained
checkpoint is only valid with the vocabulary that it was trained with.
"""

from __future__ import annotations


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


PAD, UNK, BOS, EOS = "<pad>", "<unk>", "<s>", "</s>"
SPECIALS = (PAD, UNK, BOS, EOS)
MARKS = (".", ",", ":", ";", "?", "!", "-", "'", '"', "(", ")", "/")
#: Words that carry the form of a prompt; they never occur as filler content words.
FORM = ("notes", "question", "answer", "code", "of", "is", "the", "a", "and", "then", "what")

ADJECTIVES = _words(
    """old quiet small green red blue bright heavy narrow wide soft warm cold dry wet tall short
    round plain gentle early late empty open broken hidden distant famous young clever busy calm
    dark light sharp smooth rough golden silver wooden dusty rainy sunny windy lonely sleepy
    curious patient"""
)
NOUNS = _words(
    """river bridge garden window market teacher sailor farmer baker painter doctor driver village
    harbour mountain valley forest meadow island desert castle tower station street corner kitchen
    table chair lamp mirror carpet blanket basket bottle hammer ladder wagon bicycle boat train
    horse rabbit sparrow spider kitten puppy turtle salmon apple cherry lemon pepper onion bread
    butter honey sugar coffee letter picture story song poem lesson journey party winter summer
    autumn morning evening shadow thunder rainbow cloud stone feather button pocket jacket mitten
    violin drum trumpet library museum theatre stable cellar chimney fence gate path pond brook
    hill"""
)
VERBS = _words(
    """watched followed carried painted moved crossed found left passed covered noticed visited
    repaired opened closed counted described remembered borrowed returned cleaned measured
    admired guarded greeted touched lifted pushed pulled shook warmed cooled filled emptied
    reached circled avoided answered ignored welcomed"""
)
PREPOSITIONS = _words(
    "near behind beside under above beyond across around toward inside outside against"
)
ADVERBS = _words(
    """slowly quickly quietly often sometimes later today yesterday nearly always rarely gladly
    carefully suddenly"""
)
NAMES = _words(
    """anna bruno carla david elena felix greta hugo irene jonas karin lukas maria nadia oscar
    paula quentin rosa simon tanja ulrich vera walter xenia yusuf zelda adrian bella cyril dora
    emil flora gustav helga igor julia kevin laura martin nina otto petra ralf sofia tomas ursula
    victor wanda xavier yvonne zoltan agnes boris clara dennis edith fabian gloria henrik isabel
    jakob klara leon monika norbert olga pascal regina stefan tilda urban viola wilma yannick
    zora albert berta conrad dalia erwin frida georg hanna ivan judith konrad linda mirko nora
    oleg pia rufus selma tobias udo valerie willem yara zeno amelia bernd celia dario esther
    franz gerda harald ines jasper katja lorenz mona nikolai ophelia pavel rita sergio thea
    vincent wendel"""
)
#: Codes are made of these, one token each.
NUMBERS = tuple(f"{number:02d}" for number in range(100))
#: Only so that text with single digits or letters is not lost; prompts never contain them.
DIGITS = tuple("0123456789")
LETTERS = tuple("bcdefghijklmnopqrstuvwxyz")

TOKENS: tuple[str, ...] = (
    *SPECIALS,
    *MARKS,
    *FORM,
    *PREPOSITIONS,
    *ADVERBS,
    *ADJECTIVES,
    *NOUNS,
    *VERBS,
    *NAMES,
    *NUMBERS,
    *DIGITS,
    *LETTERS,
)
ID_OF: dict[str, int] = {token: index for index, token in enumerate(TOKENS)}
if len(ID_OF) != len(TOKENS):
    raise RuntimeError("the vocabulary lists overlap")
PAD_ID, UNK_ID, BOS_ID, EOS_ID = (ID_OF[token] for token in SPECIALS)
