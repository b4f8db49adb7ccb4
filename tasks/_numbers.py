"""The number that an answer gives, exactly, or None. docs/gsm8k.md has a table of forms.

A form has one documented reading, or none: where something that may belong to the number is not
understood, there is no number, never another one. Nothing is calculated: `12*4 = 48` is 48, and
`12*4` is no answer. Every step is linear in the length of the text: the regular expressions are
possessive wherever two of their repetitions could share a character.
"""
import re
import unicodedata
from fractions import Fraction

MAX_DIGITS = 1000       # of a number as written; from 4,300 digits on Python refuses to read it
THIN = "\u2009"         # stands for every space that groups digits
MARKUP = "`"            # stands for what is only layout. It keeps apart what layout kept apart
CURRENCY = "$¢£¥\u20a0-\u20cf"
CODE = r"(?i:\b(?:USD|EUR|GBP|JPY|CNY|INR|CAD|AUD|Rs)\b)"

# ---------------------------------------------------------------- one notation for many
LATEX = {r"{,}": ",", r"\!": "", r"\,": THIN, r"\:": THIN, r"\;": THIN, "\\ ": THIN,
         r"\%": "%", r"\$": "$", r"\_": "_", r"\times": "×", r"\cdot": "×", r"\div": "÷",
         r"\dfrac": r"\frac", r"\tfrac": r"\frac", r"^\circ": "°",
         **dict.fromkeys(
             r"\( \) \[ \] \\ \boxed \fbox \text \textbf \textit \mathrm \mathbf \mathit \emph "
             r"\underline \left \right \displaystyle \quad \qquad".split(), MARKUP)}
CHARACTERS = str.maketrans({
    **dict.fromkeys("\u00ad\u200b\u200c\u200d\u200e\u200f\u2060\ufeff", MARKUP),   # no width
    **dict.fromkeys("\u00a0\u2006\u2007\u2008\u202f", THIN), "’": "'", "⁄": "/", "∕": "/",
    **dict.fromkeys("\u2010\u2011\u2212\ufe63\uff0d", "-"), **dict.fromkeys("·⋅∗✕", "×"),
    **{c: f"^{unicodedata.digit(c)}" for c in "²³⁴⁵⁶⁷⁸⁹"},
    **{c: r"\frac{" + unicodedata.normalize("NFKC", c).replace("⁄", "}{") + "}"       # 1⁄2
       for c in "½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞"}})
# Tags that are only layout. Others stay, and are not understood: <s> and <sup> change a number.
LAYOUT = re.compile(r"""(?ix) <<[^<>]*+>>(?=\s?[-.0-9$]) | <\|[a-z_]{1,20}+\|> | </s> | </?
    (?: answer|final|result|solution|b|strong|i|em|u|p|br|span|div|center|code|mark
      | end|eos|pad|end_of_turn ) \s?/?>""")
COMMAND = re.compile(r"\{,\}(?=[0-9])|\^\\circ|\\(?:[A-Za-z]++|.)")
TIMES = re.compile(r"(?<=[0-9)%])\s*+(?:x|of)\s*+(?=[0-9($])")     # 12 x 4, 50% of 84


def plain(text):
    """The text without layout (LaTeX, tags, calculations like <<12*4=48>>), in one notation."""
    text = COMMAND.sub(lambda m: LATEX.get(m[0], m[0]), LAYOUT.sub(MARKUP, text))
    text = TIMES.sub("×", text.translate(CHARACTERS))
    return text if "-" in text else text.replace("|", MARKUP)       # of a table; |-42| is 42


# ---------------------------------------------------------------- the parts of an answer
# What may stand before it: markup, brackets, currency, and words that only announce it.
BEFORE = re.compile(rf"""(?: [\s*_`"'“”‘«»()\[\]{{}}:{CURRENCY}]
    | (?i: the|final|correct|numeric|answer|ans|result|solution|total|sum|amount|cost|price|profit
        |it|is|and|so|thus|hence|therefore )\b ,?
    | {CODE} \.?
    | US(?=\$) )*+""", re.X)
SIGN = re.compile(rf"([-+]?)(?:[{CURRENCY}`*_(\[{{]++\s*+)?")      # -**42**

WHOLE = "(?:" + "|".join([rf"[1-9][0-9]{{0,2}}(?:{s}[0-9]{{3}})++" for s in (",", "'", "_", THIN)]
                         + ["[0-9]++"]) + ")"
DECIMAL = rf"(?:{WHOLE}(?:\.[0-9]++)?|\.[0-9]++)"
NUMBER = re.compile(rf"""
    (?: (?P<whole>{WHOLE}) (?=\s|\\frac) \s*+ )?                                  # 2 in 2 1/2
        (?: \\frac\s*+\{{(?P<a>[0-9]++)\}}\s*+\{{(?P<b>[0-9]++)\}}
          | (?P<n>[0-9]++)\s*+/\s*+(?P<d>[0-9]++) )
  | (?: (?P<factor>{DECIMAL}) \s*+[×*]\s*+ )? 10\^\{{?(?P<power>[-+]?[0-9]{{1,2}})(?![0-9])\}}?
  | (?P<decimal>{DECIMAL}) (?: [eE](?P<exponent>[-+]?[0-9]{{1,2}})(?![0-9]) )?
    """, re.X)
SCALE = re.compile(r"[\s`{]*+(?i:(hundred|thousand|million|billion|trillion)\b)|([kKMB])\b")
POWERS = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12,
          "k": 3, "K": 3, "M": 6, "B": 9}

# What may not follow it, because the number may then be another one.
AREA = re.compile(r"\b((?:[mdck]?m|in|inch|inches|ft|feet|foot|yd|yards?|miles?|met(?:er|re)s?)\}?)"
                  r"\^\{?[23]\}?(?![0-9])")
REFUSED = re.compile(r"""
    ^ \)*+ !  |  ^ \.\.  |  ^ …  |  ^ \{            # 5! is 120, 0.333... is 1/3, 9{ is cut off
  | ^ [*_]++ [^\W_]  |  \s \* \s                    # 5*x, 5_x
  | ^ [*_`]*+ [.):] [*_`]*+ \s++ \S                 # 1. Buy apples: the number of a step
  | / (?! \s*+ [A-Za-z])                            # 3/
  | \s [-–]  |  [-–] (?! [A-Za-z] )                 # 5 - cost; but not 5-hour
  | [\\^\#‰?]                                       # powers, and LaTeX that is not understood
    """, re.X)
# Words that are numbers or change one, wherever they stand: all that begins as these scales,
# which have many endings and spellings, or as these numbers; and whole words.
NUMBER_WORD = re.compile(r"""(?ix) (?<![a-z]) (?: (?:
        [a-z]*il+i?on | mil(?!e|k|d|li[glmps]) | bil(?!ls?\b|led\b|lboard) | tril | thou(?!gh)
      | t[a-z]{1,4}s[ae]n[dt] | h[ou]*+nd(?!s) | do?e?z | lakh | crore | eleven | twel | twent
      | third | thirt | fourt | fort[iy] | fift | sixt | seve?n | eig[ht] | nint | ninet
      | tenth | hal[fv] | quarter | repeat | recur | approx | rough | estimat ) [a-z]*+
  | (?: zero|one|two|three|four|five|six|nine|tens?|twice|double|triple|squared|cubed|factorial
      | minus|plus|negative|or|not|wrong|incorrect|at\ least|at\ most|pi|mio ) (?![a-z]) )""")
# and these next to the number only: 5 gross, but 5 points is the score
NEXT = set("gross score scores grand lac lacs mia ish odd about around nearly almost".split())
# Of the words without a vowel these are no abbreviation of a scale, as bln, thsd and dz are.
SHORT = set("""
    c cd cds cm cms d dm dr dvd dvds f ft g gb h hr hrs j kb kg kgs km kmh kms kph kw kwh l lb lbs
    ll m mb mbps mg ml mm mph mpg mr mrs ms p pc pcs pct pkg pkgs pm pt pts qt qts s sq sqft st t tb
    tbsp tsp tv tvs v w wk wks wpm yd yds yr yrs
    """.split())
ABBREVIATION = re.compile(r"(?<![a-z])[b-df-hj-np-tv-xz]++(?![a-z])")
UNITS = "ghlLs"             # single letters that may follow at once; never x, which multiplies
APART = "aCFmp"             # these not at once: 5 a day, 5 °C, 5 p.m.; 5m may be millions


def refused(rest, money):
    """Whether what follows a number on its line may make it another number.

    rest: from the number on; money: whether the line names a currency.
    """
    rest = AREA.sub(r" \1", re.sub(r"^(?:st|nd|rd|th)\b", "", rest))        # 5 m², 5th
    kinds = [unicodedata.category(c) for c in rest]
    if (REFUSED.search(rest) or NUMBER_WORD.search(rest)
            or "Sm" in kinds or kinds and kinds[0][0] in "MC"       # + < =; what changes a digit
            or any(c.isnumeric() or c.isalpha() and not c.isascii() for c in rest)
            or not SHORT.issuperset(ABBREVIATION.findall(rest.lower()))):
        return True
    word = re.match(r"([\W_]*+)([A-Za-z]++)", rest)
    if not word or word[2] in UNITS:
        return False
    if word[2] == "MM" or word[2] in ("m", "mm") and money:     # millions
        return True
    return word[2].lower() in NEXT if len(word[2]) > 1 else not (word[1] and word[2] in APART)


# A value or a calculation, and the name of one, left of a "=".
CALCULATION = re.compile(rf"""(?: [0-9.\s+\-–*/×÷^(){{}}\[\]`'"%{CURRENCY}] | ,(?=[0-9]{{3}})
                                | \\frac )*+""", re.X)
OPERATION = re.compile(r"[0-9)}\]%`]\s*+[+\-–*/×÷^(]|\\frac")
TWO = re.compile(r"[0-9]\.?[\s`]++[0-9(\[]")      # values with nothing between
NAME = re.compile(r"""[A-Za-z\s{}*_`"']*+""")


def is_calculation(text):
    """Whether the text is a calculation."""
    return CALCULATION.fullmatch(text) and OPERATION.search(text) and not TWO.search(text)


def result(line):
    """What stands right of the last `=`, if left of it are a name or calculations; else None."""
    first, *more = line.split("=")
    if not more:
        return line
    named = NAME.fullmatch(first) and not NUMBER_WORD.search(first)
    if (named or is_calculation(first)) and all(map(is_calculation, more[:-1])):
        return more[-1]


# ---------------------------------------------------------------- the reading
def value(match):
    """The value of a match of NUMBER; None if it is too long or is no number."""
    if len(match[0]) > MAX_DIGITS:
        return None

    def exact(name):
        return Fraction(re.sub(rf"[,'_{THIN}]", "", match[name] or "0"))
    if match["power"]:
        return (exact("factor") if match["factor"] else 1) * Fraction(10) ** int(match["power"])
    if match["decimal"]:
        return exact("decimal") * Fraction(10) ** int(match["exponent"] or 0)
    over, under = (exact("a"), exact("b")) if match["a"] else (exact("n"), exact("d"))
    if not under or match["whole"] and over >= under:       # 5 3/2 is no mixed number
        return None
    return exact("whole") + over / under


def read_number(text):
    """The number that a text begins with, as Fraction, or None if there is none or it is unclear.

    The rest of its line may hold a unit and words, but no second number. A number that is not on
    the first line must stand alone on its own.
    """
    text = plain(text)
    before = BEFORE.match(text)[0]
    line = text[len(before):].partition("\n")[0].rstrip()
    answer = result(line)
    if answer is None:
        return None
    start = BEFORE.match(answer).end()
    sign = SIGN.match(answer, start)
    number = NUMBER.match(answer, sign.end())
    if not number:
        return None
    found, rest = value(number), answer[number.end():]
    scale = SCALE.match(rest)
    if scale:
        rest = rest[scale.end():]
    around = (before if answer == line else "") + answer[:number.start()]
    money = re.search(rf"[{CURRENCY}]|{CODE}", before + line)
    alone = "\n" not in before or answer == line and not re.search(r"[^\W_]", rest)
    if found is None or not alone or refused(rest, money) or money and "(" in around:
        return None                     # accountants write -42 as ($42)
    if scale:
        found *= 10 ** POWERS[scale[1].lower() if scale[1] else scale[2]]
    return -found if sign[1] == "-" else found
