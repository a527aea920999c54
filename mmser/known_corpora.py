# SPDX-License-Identifier: Apache-2.0
"""Corpora of emotional speech that MMSER knows: how their authors name files, and what the parts of a name mean.

`KnownCorpus` says what an entry holds, and `CORPORA` has the entries. What is not in the names is read from tables
that come with a corpus (`corpus_tables`); `corpus_conversion` makes training data of it. Nothing is downloaded.
"""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import PurePath

from mmser.corpus_tables import Fields, Reader, read_esd, read_iemocap, read_meld, read_nemo, read_shemo
from mmser.tables import format_table

OTHER = "other"  # a clip of none of the classes, as in a label map
# The authors' names of our classes. Every other emotion is none of them: calm is never happy, and fear never sad
CLASSES = {
    "neutral": "neutral",
    **dict.fromkeys(("happy", "happiness", "joy"), "happy"),
    **dict.fromkeys(("sad", "sadness"), "sad"),
    **dict.fromkeys(("angry", "anger"), "angry"),
}
SEXES = {"f": "female", "m": "male", "female": "female", "male": "male"}


def _nothing_more(fields: Fields) -> Fields:
    return {}


@dataclass(frozen=True)
class KnownCorpus:
    """
    One corpus: who made it, and how its files are named.

    Args:
        name: value of the column `corpus`.
        made_by, paper, licence, download, note: for people to read; `download` is a page, not a file.
        language: of all clips; "" if it differs between them, see `derive`.
        clips, speakers: how many there are in the whole corpus, as its authors count.
        example: name of one file.
        pattern: regular expression of a whole path below some folder, without the suffix of the file. Its groups are
            the fields of a clip: `speaker`, `emotion`, `sex`, `sentence` and others.
        emotions: what `emotion` is in a name -> the emotion as the authors call it, in English.
        targets: emotion -> class; "" leaves its clips out, and one that is not here is none of the classes.
        sentences: what `sentence` is in a name -> the words.
        others: (pattern, reason) for files of the corpus that are no clips to train on.
        derive: more fields, from those of the name; raises ValueError with what is wrong with a name.
        read_tables: what the corpus's own tables say, see `corpus_tables`.
        key: what tells a clip from others, also in these tables: made of its fields, of which `{stem}` is the file's
            name.
        tables: which tables these are.
        needs_tables: whether a clip without a row in them is useless.
        extra: fields that become columns of their own.
        folds: names of the folds that papers use, in their order; the field `fold` has one of them.
        has_splits: whether the corpus has its own splits, in the field `split`.
        shares_speakers: whether speakers are in several of its own splits.
    """

    name: str
    made_by: str
    paper: str
    licence: str
    download: str
    language: str
    clips: str
    speakers: str
    example: str
    pattern: str
    emotions: Mapping[str, str]
    targets: Mapping[str, str] = field(default_factory=lambda: CLASSES)
    sentences: Mapping[str, str] = field(default_factory=dict)
    others: tuple[tuple[str, str], ...] = ()
    derive: Callable[[Fields], Fields] = _nothing_more
    read_tables: Reader | None = None
    key: str = "{stem}"
    tables: str = ""
    needs_tables: bool = False
    extra: tuple[str, ...] = ()
    folds: tuple[str, ...] = ()
    has_splits: bool = False
    shares_speakers: bool = False
    note: str = ""

    def recognise(self, path: PurePath) -> Fields | None:
        """The fields in the name of a file; None if it is not named as files of this corpus are."""
        name = _written(path)
        found = self._compiled.fullmatch(name)
        if found is None:
            return None
        return {"stem": name.rpartition("/")[2], **{key: text for key, text in found.groupdict().items() if text}}

    def why_no_clip(self, path: PurePath) -> str:
        """Why a file whose name `recognise` does not know is left out."""
        name = _written(path)
        return next(
            (reason for pattern, reason in self.others if _compile(pattern).fullmatch(name)),
            f"the name is not as in {self.name}, such as {self.example}",
        )

    @cached_property
    def _compiled(self) -> re.Pattern[str]:
        return _compile(self.pattern)

    @property
    def open_set(self) -> list[str]:
        """The emotions that are none of the classes."""
        return [name for name in dict.fromkeys(self.emotions.values()) if self.targets.get(name, OTHER) == OTHER]

    @property
    def splitting(self) -> str:
        """How it is divided, for people to read."""
        if self.has_splits:
            return "its own"
        return f"{len(self.folds)} folds" if self.folds else "by speaker"


def _compile(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(?:.*?/)?(?:{pattern})")  # as little in front as can be: folders are part of some patterns


def _written(path: PurePath) -> str:
    """A path without its suffix, with slashes, and with accents as most systems write them: macOS takes them apart."""
    return unicodedata.normalize("NFC", path.with_suffix("").as_posix())


def _same(*names: str) -> dict[str, str]:
    return {name: name for name in names}


# ---------------------------------------------------------------------------------- fields that follow from others


def _sex_by_parity(fields: Fields) -> Fields:
    return {"sex": "male" if int(fields["speaker"]) % 2 else "female"}


CREMA_D_WOMEN = {  # ActorID with Sex "Female" in VideoDemographics.csv of the corpus
    *("1002", "1003", "1004", "1006", "1007", "1008", "1009", "1010", "1012", "1013", "1018", "1020", "1021", "1024"),
    *("1025", "1028", "1029", "1030", "1037", "1043", "1046", "1047", "1049", "1052", "1053", "1054", "1055", "1056"),
    *("1058", "1060", "1061", "1063", "1072", "1073", "1074", "1075", "1076", "1078", "1079", "1082", "1084", "1089"),
    "1091",
}
EMO_DB_WOMEN = {"08", "09", "13", "14", "16"}
ESD_WOMEN = {"0001", "0002", "0003", "0007", "0009", "0015", "0016", "0017", "0018", "0019"}
ESD_BLOCK = 350  # sentences of an emotion, which are numbered on from one emotion to the next


def _crema_d(fields: Fields) -> Fields:
    return {"sex": "female" if fields["speaker"] in CREMA_D_WOMEN else "male"}


def _emo_db(fields: Fields) -> Fields:
    return {"sex": "female" if fields["speaker"] in EMO_DB_WOMEN else "male"}


def _tess(fields: Fields) -> Fields:
    speaker = "OAF" if fields["speaker"].upper() == "OA" else fields["speaker"].upper()  # OA_bite_neutral.wav
    word, emotion = fields["word"].lower(), fields["emotion"].lower()
    return {"speaker": speaker, "emotion": emotion, "sex": "female", "transcription": f"Say the word {word}."}


def _iemocap(fields: Fields) -> Fields:
    # The letter behind "Ses01" says who wears the markers; the last one says who speaks
    return {"speaker": f"Ses{fields['session']}{fields['sex']}", "fold": fields["session"].lstrip("0")}


def _meld(fields: Fields) -> Fields:
    split = fields["split"].lower()
    return {"split": "validation" if split in ("dev", "val") else split}


def _esd(fields: Fields) -> Fields:
    emotion = str((int(fields["number"]) - 1) // ESD_BLOCK)
    folder = fields.get("folder")
    if folder and ESD_EMOTIONS.get(emotion) != folder.lower():
        raise ValueError(f"it lies in the folder {folder}, but has a number of {ESD_EMOTIONS.get(emotion, 'none')}")
    return {
        "emotion": emotion,
        "sex": "female" if fields["speaker"] in ESD_WOMEN else "male",
        "language": "zh" if int(fields["speaker"]) <= 10 else "en",
    }


def _aesdd(fields: Fields) -> Fields:
    return {"speaker": fields["speaker"].lstrip("0")}  # "f12 (01).wav" is by the same actor as "f14 (1).wav"


def _ased(fields: Fields) -> Fields:
    return {"emotion": fields["emotion"].lower(), "sex": "female" if fields["gender"] == "01" else "male"}


def _turev(fields: Fields) -> Fields:
    word = fields["word"].lower()
    return {"transcription": TUREV_WORDS.get(word, word)}


# ------------------------------------------------------------------------------------------------ tables of entries

ESD_EMOTIONS = {"0": "neutral", "1": "angry", "2": "happy", "3": "sad", "4": "surprise"}

# Words of TurEV-DB in Turkish spelling: the names of its files are in ASCII
_TURKISH = (
    "algı açık beste buğu ceren defne demet demir deve deyim dil dizge düğün elmacık eski eğer fırıldak gezi "
    "göz güneş gürbüz gıcık hekim iğde japon karton kağıt kedi kemik kibir kiler koku konuk koy kulaç kuşluk "
    "küstah kırgın lokma lüfer melek müjde nasıl niçin okul oğul pamuk pas pıhtı rıhtım saf satır sepet serin "
    "sevgi simit soba sucuk tahta tembel türev tırtıl utanç vurgu yankı yazım yığılmak yığın zeytin çay "
    "çekirge çene çilek ödenek ölçüt ördek örgü ünlü ısırgan şarap şarj şenlik"
)
TUREV_WORDS = {word.translate(str.maketrans("çğıöşü", "cgiosu")): word for word in _TURKISH.split()}

# ---------------------------------------------------------------------------------------------------- the entries

CORPORA: dict[str, KnownCorpus] = {
    # Scheme: "File naming convention" of the Zenodo record. Modality, channel, emotion, intensity, statement,
    # repetition, actor; actors with odd numbers are men
    "ravdess": KnownCorpus(
        name="RAVDESS",
        made_by="S. R. Livingstone and F. A. Russo, Ryerson University",
        paper="The Ryerson Audio-Visual Database of Emotional Speech and Song (RAVDESS). PLoS ONE 13(5), 2018",
        licence="CC BY-NC-SA 4.0",
        download="https://zenodo.org/records/1188976",
        language="en",
        clips="1,440",
        speakers="24",
        example="03-01-06-01-02-01-12.wav",
        pattern=r"03-01-(?P<emotion>0[1-8])-(?P<intensity>0[12])-(?P<sentence>0[12])-0[12]-(?P<speaker>\d\d)",
        others=(
            (r"03-02-0[1-8]-0[12]-0[12]-0[12]-\d\d", "song, not speech"),
            (r"0[12]-0[12]-0[1-8]-0[12]-0[12]-0[12]-\d\d", "video; the audio alone is the file 03-..."),
        ),
        emotions=dict(
            zip(
                ("01", "02", "03", "04", "05", "06", "07", "08"),
                ("neutral", "calm", "happy", "sad", "angry", "fearful", "disgust", "surprised"),
                strict=True,
            )
        ),
        sentences={"01": "Kids are talking by the door.", "02": "Dogs are sitting by the door."},
        derive=_sex_by_parity,
        note="Calm is meant to be near neutral: with `--map calm=neutral` it is, with `--map calm=` it is left out.",
    ),
    # Scheme: "Additional Information" on emodb.bilderbar.info. Speaker, text, emotion (letter of the German word),
    # version; the texts and the speakers' sexes are on the same page
    "emodb": KnownCorpus(
        name="EMO-DB",
        made_by="F. Burkhardt, A. Paeschke, M. Rolfes, W. F. Sendlmeier and B. Weiss, TU Berlin",
        paper="A Database of German Emotional Speech. Interspeech 2005",
        licence="free of charge; CC0 1.0 as audEERING publishes it",
        download="http://emodb.bilderbar.info",
        language="de",
        clips="535",
        speakers="10",
        example="03a01Fa.wav",
        pattern=r"(?P<speaker>\d\d)(?P<sentence>[ab]\d\d)(?P<emotion>[WLEAFTN])(?P<version>[a-z]?)",
        emotions={
            "W": "anger",
            "L": "boredom",
            "E": "disgust",
            "A": "fear",
            "F": "happiness",
            "T": "sadness",
            "N": "neutral",
        },
        sentences={
            "a01": "Der Lappen liegt auf dem Eisschrank.",
            "a02": "Das will sie am Mittwoch abgeben.",
            "a04": "Heute abend könnte ich es ihm sagen.",
            "a05": "Das schwarze Stück Papier befindet sich da oben neben dem Holzstück.",
            "a07": "In sieben Stunden wird es soweit sein.",
            "b01": "Was sind denn das für Tüten, die da unter dem Tisch stehen?",
            "b02": "Sie haben es gerade hochgetragen und jetzt gehen sie wieder runter.",
            "b03": "An den Wochenenden bin ich jetzt immer nach Hause gefahren und habe Agnes besucht.",
            "b09": "Ich will das eben wegbringen und dann mit Karl was trinken gehen.",
            "b10": "Die wird auf dem Platz sein, wo wir sie immer hinlegen.",
        },
        derive=_emo_db,
    ),
    # Scheme: README and paper of the corpus. Actor, sentence, emotion, level (LO, MD, HI, XX for unspecified; one file
    # has X); sexes in VideoDemographics.csv
    "crema-d": KnownCorpus(
        name="CREMA-D",
        made_by="H. Cao, D. G. Cooper, M. K. Keutmann, R. C. Gur, A. Nenkova and R. Verma",
        paper="CREMA-D: Crowd-sourced Emotional Multimodal Actors Dataset. IEEE Trans. Affective Computing 5(4), 2014",
        licence="ODbL 1.0, contents DbCL 1.0",
        download="https://github.com/CheyneyComputerScience/CREMA-D",
        language="en",
        clips="7,442",
        speakers="91",
        example="1001_DFA_ANG_XX.wav",
        pattern=r"(?P<speaker>10\d\d)_(?P<sentence>[A-Z]{3})_(?P<emotion>[A-Z]{3})_(?P<level>LO|MD|HI|XX?)",
        emotions={"ANG": "anger", "DIS": "disgust", "FEA": "fear", "HAP": "happy", "NEU": "neutral", "SAD": "sad"},
        sentences={
            "IEO": "It's eleven o'clock.",
            "TIE": "That is exactly what happened.",
            "IOM": "I'm on my way to the meeting.",
            "IWW": "I wonder what this is about.",
            "TAI": "The airplane is almost full.",
            "MTI": "Maybe tomorrow it will be cold.",
            "IWL": "I would like a new alarm clock.",
            "ITH": "I think I have a doctor's appointment.",
            "DFA": "Don't forget a jacket.",
            "ITS": "I think I've seen this before.",
            "TSI": "The surface is slick.",
            "WSI": "We'll stop in a couple of minutes.",
        },
        derive=_crema_d,
        note="The label is the emotion that the actor was to show, not what listeners heard.",
    ),
    # Scheme: page of the corpus. Older or younger woman, word, emotion ("ps" is pleasant surprise)
    "tess": KnownCorpus(
        name="TESS",
        made_by="K. Dupuis and M. K. Pichora-Fuller, University of Toronto",
        paper="Toronto emotional speech set (TESS). University of Toronto, 2010",
        licence="CC BY-NC-ND 4.0",
        download="https://tspace.library.utoronto.ca/handle/1807/24487",
        language="en",
        clips="2,800",
        speakers="2",
        example="OAF_back_angry.wav",
        pattern=r"(?i:(?P<speaker>OAF?|YAF)_(?P<word>[a-z]+)_"
        r"(?P<emotion>angry|disgust|fear|happy|neutral|ps|pleasant_surprised?|sad))",
        emotions={
            **_same("angry", "disgust", "fear", "happy", "neutral", "sad"),
            **dict.fromkeys(("ps", "pleasant_surprise", "pleasant_surprised"), "pleasant surprise"),
        },
        derive=_tess,
        note="With two speakers one trains and one validates, and there is no test data.",
    ),
    # Scheme: Info.txt of the corpus. Speaker (a folder; in the release of audio alone the start of the name), emotion,
    # sentence
    "savee": KnownCorpus(
        name="SAVEE",
        made_by="S. Haq and P. J. B. Jackson, University of Surrey",
        paper="Multimodal Emotion Recognition. In: Machine Audition, IGI Global 2010",
        licence="free for research, after registration",
        download="http://kahlan.eps.surrey.ac.uk/savee/",
        language="en",
        clips="480",
        speakers="4",
        example="DC_a01.wav or DC/a01.wav",
        pattern=r"(?P<speaker>DC|JE|JK|KL)[_/](?P<emotion>sa|su|[adfhn])(?P<number>\d\d)",
        emotions={
            "a": "anger",
            "d": "disgust",
            "f": "fear",
            "h": "happiness",
            "n": "neutral",
            "sa": "sadness",
            "su": "surprise",
        },
        derive=lambda fields: {"sex": "male"},
        key="{speaker}_{emotion}{number}",
        note="The sentences are of TIMIT; which number is which is not in the corpus, so there are no transcripts.",
    ),
    # Scheme: documentation of the corpus. Session and who wears the markers, dialogue, speaker and turn. Emotions are
    # in dialog/EmoEvaluation, words in dialog/transcriptions
    "iemocap": KnownCorpus(
        name="IEMOCAP",
        made_by="C. Busso and others, University of Southern California",
        paper="IEMOCAP: Interactive emotional dyadic motion capture database. Language Resources and Evaluation 42, "
        "2008",
        licence="research, by agreement with USC",
        download="https://sail.usc.edu/iemocap/",
        language="en",
        clips="10,039",
        speakers="10",
        example="Ses01F_impro01_F000.wav",
        pattern=r"Ses(?P<session>0[1-5])[FM]_(?:impro|script)\w+_(?P<sex>[FM])(?:\d{3}|XX\d)",
        others=((r"Ses0[1-5][FM]_(?:impro|script)\d\d(?:_\d)?[ab]?", "a whole dialogue"),),
        emotions={
            "ang": "anger",
            "hap": "happiness",
            "exc": "excitement",
            "sad": "sadness",
            "neu": "neutral",
            "fru": "frustration",
            "fea": "fear",
            "sur": "surprise",
            "dis": "disgust",
            "oth": "other",
            "xxx": "no agreement",
        },
        targets={**CLASSES, "no agreement": ""},
        derive=_iemocap,
        read_tables=read_iemocap,
        tables="dialog/EmoEvaluation/*.txt",
        needs_tables=True,
        extra=("valence", "activation", "dominance"),
        folds=("1", "2", "3", "4", "5"),
        note="Most papers count excitement as happiness (5,531 clips of four classes): `--map excitement=happy`. A "
        "fold is a session, in which two speakers talk to each other.",
    ),
    # Scheme: README of the corpus. A folder for each split, dialogue, utterance; all else is in <split>_sent_emo.csv
    "meld": KnownCorpus(
        name="MELD",
        made_by="S. Poria, D. Hazarika, N. Majumder, G. Naik, E. Cambria and R. Mihalcea",
        paper="MELD: A Multimodal Multi-Party Dataset for Emotion Recognition in Conversations. ACL 2019",
        licence="GPL-3.0 for the annotations; the clips are of the series Friends",
        download="https://github.com/declare-lab/MELD",
        language="en",
        clips="13,708",
        speakers="about 260",
        example="train_splits/dia0_utt0.mp4",
        pattern=r"(?i:[^/]*(?P<split>train|dev|val|test)[^/]*/dia(?P<dialogue>\d+)_utt(?P<utterance>\d+))",
        others=((r".*final_videos_test.*", "a spare clip that no table names"),),
        emotions=_same("neutral", "joy", "sadness", "anger", "surprise", "fear", "disgust"),
        derive=_meld,
        read_tables=read_meld,
        key="{split}/dia{dialogue}_utt{utterance}",
        tables="train_sent_emo.csv, dev_sent_emo.csv and test_sent_emo.csv",
        needs_tables=True,
        extra=("sentiment",),
        has_splits=True,
        shares_speakers=True,
        note="The clips are videos, which are read with the extra `av`. Six actors are in all splits.",
    ),
    # Scheme: README of the corpus. Speaker, emotion, sentence; words and sexes are in data.tsv
    "nemo": KnownCorpus(
        name="nEMO",
        made_by="I. Christop, Adam Mickiewicz University",
        paper="nEMO: Dataset of Emotional Speech in Polish. LREC-COLING 2024",
        licence="CC BY-NC-SA 4.0",
        download="https://github.com/amu-cai/nEMO",
        language="pl",
        clips="4,481",
        speakers="9",
        example="SK0_anger_1.wav",
        pattern=r"(?P<speaker>[A-Z]{2}\d)_(?P<emotion>[a-z]+)_(?P<number>\d+)",
        emotions=_same("anger", "fear", "happiness", "neutral", "sadness", "surprised"),
        read_tables=read_nemo,
        tables="data.tsv",
    ),
    # Scheme: names in the repository of the corpus. Speaker with sex, file, emotion with number
    "urdu": KnownCorpus(
        name="URDU",
        made_by="S. Latif, A. Qayyum, M. Usman and J. Qadir",
        paper="Cross Lingual Speech Emotion Recognition: Urdu vs. Western Languages. FIT 2018",
        licence="research only",
        download="https://github.com/siddiquelatif/URDU-Dataset",
        language="ur",
        clips="400",
        speakers="38",
        example="SM1_F10_A010.wav",
        pattern=r"(?P<speaker>S(?P<sex>[MF])\d+)_F\d+_(?P<emotion>[AHNS])(?P<number>\d+)",
        emotions={"A": "angry", "H": "happy", "N": "neutral", "S": "sad"},
        note="Most speakers have one emotion only, so voice and emotion are hard to tell apart.",
    ),
    # Scheme: paper of the corpus and documents that come with it. Emotion (start of the Italian word), actor, sentence
    "emovo": KnownCorpus(
        name="EMOVO",
        made_by="G. Costantini, I. Iaderola, A. Paoloni and M. Todisco",
        paper="EMOVO Corpus: an Italian Emotional Speech Database. LREC 2014",
        licence="none found; offered for research",
        download="http://voice.fub.it/activities/corpora/emovo/index.html",
        language="it",
        clips="588",
        speakers="6",
        example="dis-f1-b1.wav",
        pattern=r"(?P<emotion>dis|gio|neu|pau|rab|sor|tri)-(?P<speaker>(?P<sex>[fm])[1-3])-(?P<sentence>[bldn]\d)",
        emotions={
            "dis": "disgust",
            "gio": "joy",
            "neu": "neutral",
            "pau": "fear",
            "rab": "anger",
            "sor": "surprise",
            "tri": "sadness",
        },
        sentences={
            "b1": "Gli operai si alzano presto.",
            "b2": "I vigili sono muniti di pistola.",
            "b3": "La cascata fa molto rumore.",
            "l1": "L'autunno prossimo Tony partirà per la Spagna: nella prima metà di ottobre.",
            "l2": "Ora prendo la felpa di là ed esco per fare una passeggiata.",
            "l3": "Un attimo dopo s'è incamminato... ed è inciampato.",
            "l4": "Vorrei il numero telefonico del Signor Piatti.",
            "n1": "La casa forte vuole col pane.",
            "n2": "La forza trova il passo e l'aglio rosso.",
            "n3": "Il gatto sta scorrendo nella pera.",
            "n4": "Insalata pastasciutta coscia d'agnello limoncello.",
            "n5": "Uno quarantatré dieci mille cinquantasette venti.",
            "d1": "Sabato sera cosa farà?",
            "d2": "Porti con te quella cosa?",
        },
    ),
    # Scheme: Readme.txt of the corpus. Actor, emotion (letter of the French word), intensity, sentence; actors with
    # odd numbers are men
    "cafe": KnownCorpus(
        name="CaFE",
        made_by="P. Gournay, O. Lahaie and R. Lefebvre, Université de Sherbrooke",
        paper="A Canadian French Emotional Speech Dataset. ACM Multimedia Systems 2018",
        licence="CC BY-NC-SA 4.0",
        download="https://zenodo.org/records/1478765",
        language="fr",
        clips="936",
        speakers="12",
        example="01-C-1-1.wav",
        pattern=r"(?P<speaker>\d\d)-(?P<emotion>[CDJNPST])-(?P<intensity>[0-2])-(?P<sentence>[1-6])",
        emotions={
            "C": "anger",
            "D": "disgust",
            "J": "happiness",
            "N": "neutral",
            "P": "fear",
            "S": "surprise",
            "T": "sadness",
        },
        sentences={
            "1": "Un cheval fou dans mon jardin.",
            "2": "Deux ânes aigris au pelage brun.",
            "3": "Trois cygnes aveugles au bord du lac.",
            "4": "Quatre vieilles truies éléphantesques.",
            "5": "Cinq pumas fiers et passionnés.",
            "6": "Six ours aimants domestiqués.",
        },
        derive=_sex_by_parity,
    ),
    # Scheme: readme of the corpus. Emotion, utterance, speaker in brackets. It gives the sexes of the first five
    # actors only as a sum
    "aesdd": KnownCorpus(
        name="AESDD",
        made_by="N. Vryzas, R. Kotsakis, A. Liatsou, C. A. Dimoulas and G. Kalliris, Aristotle University",
        paper="Speech Emotion Recognition for Performance Interaction. Journal of the AES 66(6), 2018",
        licence="none found",
        download="http://m3c.web.auth.gr/research/aesdd-speech-emotion-recognition/",
        language="el",
        clips="about 600",
        speakers="6",
        example="a01 (1).wav",
        pattern=r"(?P<emotion>[adfhs])(?P<number>\d\d) ?\((?P<speaker>\d+)\)(?P<take>[a-z]?)",
        emotions={"a": "anger", "d": "disgust", "f": "fear", "h": "happiness", "s": "sadness"},
        derive=_aesdd,
        note="It has no neutral clips.",
    ),
    # Scheme: ReadMe.txt of the corpus, which has the sexes. Speaker, number; 350 sentences of each emotion follow each
    # other. Words are in <speaker>.txt
    "esd": KnownCorpus(
        name="ESD",
        made_by="K. Zhou, B. Sisman, R. Liu and H. Li, National University of Singapore",
        paper="Emotional voice conversion: Theory, databases and ESD. Speech Communication 137, 2022",
        licence="research only, by agreement",
        download="https://github.com/HLTSingapore/Emotional-Speech-Data",
        language="",
        clips="35,000",
        speakers="20",
        example="0011/Angry/0011_000351.wav",
        pattern=r"(?:(?P<folder>Angry|Happy|Neutral|Sad|Surprise)/)?(?:(?:train|evaluation|test)/)?"
        r"(?P<speaker>00(?:0[1-9]|1\d|20))_(?P<number>\d{6})",
        emotions=ESD_EMOTIONS,
        derive=_esd,
        read_tables=read_esd,
        tables="0001.txt and so on",
        note="Speakers 0001 to 0010 speak Mandarin, the others English. Its own splits have all speakers in each, and "
        "are not used.",
    ),
    # Scheme: README of the corpus. Sex and speaker, emotion (W is surprise), number; words are in shemo.json
    "shemo": KnownCorpus(
        name="ShEMO",
        made_by="O. Mohamad Nezami, P. Jamshid Lou and M. Karami, Sharif University of Technology",
        paper="ShEMO: a large-scale validated database for Persian speech emotion detection. Language Resources and "
        "Evaluation 53, 2019",
        licence="free for academic use",
        download="https://github.com/pariajm/sharif-emotional-speech-dataset",
        language="fa",
        clips="3,000",
        speakers="87",
        example="F01A01.wav",
        pattern=r"(?P<speaker>(?P<sex>[FM])\d\d)(?P<emotion>[AFHNSW])(?P<number>\d\d)",
        emotions={
            "A": "anger",
            "F": "fear",
            "H": "happiness",
            "N": "neutral",
            "S": "sadness",
            "W": "surprise",
        },
        read_tables=read_shemo,
        tables="shemo.json",
    ),
    # Scheme: names in the folder "Sound Source" of the repository. Speaker, emotion (kz in the folder Angry, sk in
    # Calm, mt in Happy, hl in Sad), word
    "turev": KnownCorpus(
        name="TurEV-DB",
        made_by="S. F. Canpolat, Z. Ormanoğlu and D. Zeyrek, Middle East Technical University",
        paper="Turkish Emotion Voice Database (TurEV-DB). SLTU-CCURL 2020",
        licence="CC BY-NC-ND 4.0",
        download="https://github.com/Xeonen/TurEV-DB",
        language="tr",
        clips="over 1,700",
        speakers="6",
        example="1157_kz_acik.wav",
        pattern=r"(?P<speaker>\d{4})_(?P<emotion>kz|sk|mt|hl)_(?P<word>[A-Za-z]+)",
        emotions={"kz": "angry", "sk": "calm", "mt": "happy", "hl": "sad"},
        targets={**CLASSES, "calm": "neutral"},
        derive=_turev,
        note="It has calm in place of neutral, and calm is taken as neutral; `--map calm=other` makes it none of the "
        "classes. The clips are single words.",
    ),
    # Scheme: README of the corpus. Emotion and its folder, sentence, repetition, sex, speaker
    "ased": KnownCorpus(
        name="ASED",
        made_by="E. A. Retta, E. Almekhlafi, R. Sutcliffe, M. Mhamed, H. Ali and J. Feng, Northwest University",
        paper="A New Amharic Speech Emotion Dataset and Classification Benchmark. ACM TALLIP 22(1), 2023",
        licence="none stated",
        download="https://github.com/Ethio2021/ASED_V1",
        language="am",
        clips="2,474",
        speakers="65",
        example="a5-03-01-02-50.wav",
        pattern=r"(?P<emotion>[nfhsaNFHSA])\d-(?P<number>\d\d)-(?P<repetition>\d\d)-(?P<gender>0[12])-(?P<speaker>\d\d)",
        emotions={"n": "neutral", "f": "fear", "h": "happy", "s": "sad", "a": "angry"},
        derive=_ased,
        note="Sentences 01 and 02 were said in every emotion; the words of the others belong to one emotion.",
    ),
}


# -------------------------------------------------------------------------------------------------------- in words


def describe_corpus(corpus: KnownCorpus) -> str:
    """Who made it, under which licence, and where it is."""
    classes = defaultdict(list)
    for emotion in dict.fromkeys(corpus.emotions.values()):
        classes[corpus.targets.get(emotion, OTHER)].append(emotion)
    known = [
        target if emotions == [target] else f"{target} ({', '.join(emotions)})"
        for target in dict.fromkeys(CLASSES.values())
        if (emotions := classes[target])
    ]
    others = [
        f"{text}: {', '.join(classes[target])}."
        for target, text in ((OTHER, "None of them"), ("", "Left out"))
        if classes[target]
    ]
    lines = [
        f"Made by {corpus.made_by}.",
        f"Paper: {corpus.paper}.",
        f"Licence: {corpus.licence}.",
        f"Download it by hand: {corpus.download}",
        f"Files are named like {corpus.example}; there are {corpus.clips} clips by {corpus.speakers} speakers.",
        f"Classes: {', '.join(known)}. {' '.join(others)}".rstrip(),
        corpus.note,
    ]
    return "\n".join(f"- {line}" for line in lines if line)


def table_of_known_corpora() -> str:
    """All corpora, in Markdown."""
    rows = [
        {
            "name": f"`{key}`",
            "corpus": f"[{corpus.name}]({corpus.download})",
            "language": corpus.language or "en, zh",
            "clips": corpus.clips,
            "speakers": corpus.speakers,
            "none of the classes": ", ".join(corpus.open_set) or "-",
            "splits": corpus.splitting,
            "licence": corpus.licence,
        }
        for key, corpus in CORPORA.items()
    ]
    return format_table(rows, list(rows[0]))
