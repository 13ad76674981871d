"""Generated text: that of two owners (worked arithmetic problems; discharge notes of a fictional hospital), and some of
the public corpus (sums, work orders).

Every name, patient and number is invented. Each function returns one document and draws from the generator it is given.
"""

import random
from collections.abc import Callable
from fractions import Fraction

NAMES = ("Mara", "Tom", "Aisha", "Jonas", "Lena", "Omar", "Priya", "Felix", "Noor", "Ivan", "Sofia", "Kwame")
THINGS = ("pencils", "apples", "stamps", "marbles", "tickets", "bricks", "candles", "postcards", "oranges", "shells")


def _boxes(r: random.Random) -> tuple[str, list[str], str]:
    boxes, each, thing = r.randint(2, 12), r.randint(3, 20), r.choice(THINGS)
    given = r.randint(1, boxes * each - 1)
    one, other = r.sample(NAMES, 2)
    total = boxes * each
    question = r.choice(
        (
            f"{one} has {boxes} boxes with {each} {thing} in each and gives {given} {thing} to {other}. "
            "How many are left?",
            f"There are {each} {thing} in each of {boxes} boxes. {other} takes {given} of them. "
            f"How many does {one} keep?",
        )
    )
    return question, [f"{boxes} * {each} = {total}", f"{total} - {given} = {total - given}"], f"{total - given} {thing}"


def _shopping(r: random.Random) -> tuple[str, list[str], str]:
    name, (first, second) = r.choice(NAMES), r.sample(THINGS, 2)
    a, price_a, b, price_b = r.randint(2, 9), r.randint(2, 15), r.randint(2, 9), r.randint(2, 15)
    total = a * price_a + b * price_b
    paid = (total // 50 + 1) * 50
    return (
        f"{name} buys {a} {first} for {price_a} cents each and {b} {second} for {price_b} cents each and pays with "
        f"{paid} cents. How much change is there?",
        [
            f"{a} * {price_a} = {a * price_a}",
            f"{b} * {price_b} = {b * price_b}",
            f"{a * price_a} + {b * price_b} = {total}",
            f"{paid} - {total} = {paid - total}",
        ],
        f"{paid - total} cents",
    )


def _long_multiplication(r: random.Random) -> tuple[str, list[str], str]:
    a, b = r.randint(12, 99), r.randint(12, 99)
    tens, ones = b // 10 * 10, b % 10
    return (
        f"What is {a} times {b}?",
        [
            f"{b} = {tens} + {ones}",
            f"{a} * {tens} = {a * tens}",
            f"{a} * {ones} = {a * ones}",
            f"{a * tens} + {a * ones} = {a * b}",
        ],
        f"{a * b}",
    )


def _equation(r: random.Random) -> tuple[str, list[str], str]:
    x, a, b = r.randint(2, 20), r.randint(2, 9), r.randint(1, 40)
    return (
        f"Solve {a} * x + {b} = {a * x + b} for x.",
        [f"{a} * x = {a * x + b} - {b} = {a * x}", f"x = {a * x} / {a} = {x}"],
        f"x = {x}",
    )


def _average(r: random.Random) -> tuple[str, list[str], str]:
    count, mean = r.randint(3, 5), r.randint(5, 40)
    values = [mean + r.randint(-4, 4) for _ in range(count - 1)]
    values.append(count * mean - sum(values))
    return (
        f"{r.choice(NAMES)} scores {', '.join(map(str, values))} in {count} games. What is the average?",
        [f"{' + '.join(map(str, values))} = {count * mean}", f"{count * mean} / {count} = {mean}"],
        f"{mean}",
    )


def _fractions(r: random.Random) -> tuple[str, list[str], str]:
    b, d = r.randint(2, 9), r.randint(2, 9)
    a, c = r.randint(1, b), r.randint(1, d)
    total = Fraction(a, b) + Fraction(c, d)
    return (
        f"What is {a}/{b} + {c}/{d}?",
        [
            f"{a}/{b} = {a * d}/{b * d}",
            f"{c}/{d} = {c * b}/{b * d}",
            f"{a * d}/{b * d} + {c * b}/{b * d} = {a * d + c * b}/{b * d}",
        ],
        f"{total}",
    )


def _percent(r: random.Random) -> tuple[str, list[str], str]:
    price, percent = r.randint(2, 40) * 20, r.choice((5, 10, 15, 20, 25, 30, 40, 50))
    off = price * percent // 100
    return (
        f"A coat costs {price} coins. It is sold at {percent} percent off. What is the new price?",
        [f"{price} / 100 * {percent} = {off}", f"{price} - {off} = {price - off}"],
        f"{price - off} coins",
    )


def _speed(r: random.Random) -> tuple[str, list[str], str]:
    speed, hours, more = r.randint(3, 18) * 5, r.randint(2, 9), r.randint(5, 60)
    return (
        f"A train travels {hours} hours at {speed} km per hour and then {more} km more. How far does it travel?",
        [f"{hours} * {speed} = {hours * speed}", f"{hours * speed} + {more} = {hours * speed + more}"],
        f"{hours * speed + more} km",
    )


def _division(r: random.Random) -> tuple[str, list[str], str]:
    people, share, rest, thing = r.randint(3, 12), r.randint(3, 25), r.randint(0, 2), r.choice(THINGS)
    total = people * share + rest
    return (
        f"{total} {thing} are shared equally by {people} children. How many does each get, and how many are left?",
        [f"{people} * {share} = {people * share}", f"{total} - {people * share} = {rest}"],
        f"{share} each, {rest} left",
    )


_PROBLEMS: tuple[Callable[[random.Random], tuple[str, list[str], str]], ...] = (
    _boxes,
    _shopping,
    _long_multiplication,
    _equation,
    _average,
    _fractions,
    _percent,
    _speed,
    _division,
)


def arithmetic_document(r: random.Random) -> str:
    """A worksheet of three to eight problems with worked answers."""
    parts = []
    for number in range(1, r.randint(3, 8) + 1):
        question, steps, answer = r.choice(_PROBLEMS)(r)
        worked = "\n".join(f"Step {step}: {line}" for step, line in enumerate(steps, 1))
        parts.append(f"Problem {number}: {question}\n{worked}\nAnswer: {answer}\n")
    return "\n".join(parts)


# diagnosis: presentation, examination, laboratory value (name, unit, low, high), drugs, advice
_CONDITIONS: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, str, int, int], tuple[str, ...], str]] = {
    "community-acquired pneumonia": (
        ("productive cough", "fever", "pleuritic chest pain", "SOB on exertion"),
        ("crackles R base", "crackles L base"),
        ("CRP", "mg/L", 60, 280),
        ("amoxicillin 500 mg PO TDS", "doxycycline 100 mg PO BD"),
        "repeat CXR in 6/52",
    ),
    "decompensated heart failure": (
        ("worsening SOB", "orthopnoea", "ankle swelling", "weight gain"),
        ("JVP raised, bibasal crackles", "pitting oedema"),
        ("NT-proBNP", "ng/L", 900, 9000),
        ("furosemide 40 mg PO OD", "bisoprolol 2.5 mg PO OD", "ramipril 2.5 mg PO OD"),
        "daily weights, fluid restriction 1.5 L",
    ),
    "COPD exacerbation": (
        ("wheeze", "increased sputum", "SOB at rest"),
        ("widespread wheeze, no crackles", "prolonged expiration"),
        ("WCC", "x10^9/L", 9, 19),
        ("prednisolone 30 mg PO OD 5/7", "salbutamol inh PRN", "tiotropium inh OD"),
        "smoking cessation referral",
    ),
    "diabetic ketoacidosis": (
        ("polyuria", "vomiting", "abdo pain", "thirst"),
        ("dehydrated, Kussmaul breathing", "dry mucosa, abdo soft"),
        ("glucose", "mmol/L", 18, 38),
        ("insulin glargine 18 units SC nocte", "insulin aspart SC with meals"),
        "sick day rules given, DSN review",
    ),
    "pyelonephritis": (
        ("loin pain", "rigors", "dysuria"),
        ("R renal angle tender", "L renal angle tender"),
        ("CRP", "mg/L", 80, 310),
        ("ciprofloxacin 500 mg PO BD 7/7", "paracetamol 1 g PO QDS"),
        "chase MSU result",
    ),
    "acute appendicitis": (
        ("abdo pain migrating to RIF", "anorexia", "nausea"),
        ("RIF guarding, Rovsing positive", "rebound tender RIF"),
        ("WCC", "x10^9/L", 11, 21),
        ("co-amoxiclav 625 mg PO TDS 5/7", "ibuprofen 400 mg PO TDS"),
        "wound check at GP in 7/7",
    ),
    "new atrial fibrillation": (
        ("palpitations", "light-headedness", "fatigue"),
        ("pulse irregularly irregular", "HS I+II, irregular"),
        ("TSH", "mU/L", 1, 5),
        ("apixaban 5 mg PO BD", "bisoprolol 5 mg PO OD"),
        "echo as OP, AF clinic",
    ),
    "fractured neck of femur": (
        ("fall at home", "hip pain", "unable to weight bear"),
        ("leg shortened, externally rotated", "NV intact distally"),
        ("Hb", "g/L", 82, 128),
        ("enoxaparin 40 mg SC OD 28/7", "alendronic acid 70 mg PO weekly"),
        "physio, falls clinic, DEXA",
    ),
}
_DOCTORS = ("Okafor", "Lindqvist", "Moreau", "Tanaka", "Reyes", "Novak", "Haddad")
_WARDS = ("Alder", "Birch", "Cedar", "Hazel", "Maple", "Rowan")
_HISTORY = ("HTN", "T2DM", "asthma", "IHD", "CKD 3", "OA", "hypothyroid", "depression", "gout", "nil of note")


def clinic_document(r: random.Random) -> str:
    """A hospital discharge note, in capitals like the printouts of old hospital systems."""
    diagnosis = r.choice(tuple(_CONDITIONS))
    symptoms, signs, (test, unit, low, high), drugs, advice = _CONDITIONS[diagnosis]
    age, sex = r.randint(19, 94), r.choice("MF")
    pronoun = "He" if sex == "M" else "She"
    admitted, stay = r.randint(1, 20), r.randint(2, 9)
    month = r.randint(1, 12)
    value = r.randint(low, high)
    history = ", ".join(r.sample(_HISTORY[:-1], r.randint(1, 3))) if r.random() < 0.85 else _HISTORY[-1]
    complaints = ", ".join(r.sample(symptoms, r.randint(2, len(symptoms))))
    given = r.sample(drugs, r.randint(1, len(drugs)))
    course = r.choice(
        (
            f"Treated as {diagnosis} with good response. {test} down to {max(1, value // 3)} by day {stay}.",
            f"{pronoun} improved on treatment; {test} {value} on admission, {max(1, value // 2)} at discharge.",
            f"Slow to improve, senior review day 2, treatment continued. {test} {max(1, value // 2)} at discharge.",
        )
    )
    complication = r.choice(
        (
            "Nil complications.",
            "Brief AKI, resolved with IVI.",
            "One episode of delirium, settled.",
            "Hypokalaemia, replaced.",
            "Nil complications.",
        )
    )
    note = (
        f"DISCHARGE NOTE  Ward: {r.choice(_WARDS)}  Pt no: {r.randint(100000, 999999)}\n"
        f"Age/Sex: {age}{sex}  Adm: {admitted:02d}/{month:02d}  Disch: {admitted + stay:02d}/{month:02d}  "
        f"LOS: {stay}/7\n"
        f"Dx: {diagnosis}\nPMH: {history}\n"
        f"Allergies: {r.choice(('NKDA', 'NKDA', 'NKDA', 'penicillin', 'latex'))}\n\n"
        f"PC: {age}yo {sex} with {r.randint(1, 9)}/7 hx of {complaints}.\n"
        f"O/E: T {r.randint(362, 394) / 10} HR {r.randint(64, 128)} BP {r.randint(92, 178)}/{r.randint(54, 98)} "
        f"RR {r.randint(12, 30)} SpO2 {r.randint(86, 99)}% RA. {r.choice(signs)}.\n"
        f"Ix: {test} {value} {unit}, Na {r.randint(128, 145)}, K {r.randint(30, 55) / 10}, "
        f"creat {r.randint(55, 190)}.\n"
        f"Course: {course} {complication}\n\n"
        "TTO:\n"
        + "".join(f"  {number}. {drug}\n" for number, drug in enumerate(given, 1))
        + f"Plan: {advice}. GP to repeat U+E in {r.randint(1, 4)}/52. "
        f"{r.choice(('TCI PRN', 'No OP f/u', 'OP f/u 6/52'))}.\n"
        f"Signed: Dr {r.choice('ABCDEFGHJKLMNPRSTW')}. {r.choice(_DOCTORS)}, "
        f"{r.choice(('FY1', 'FY2', 'SHO', 'SpR'))}\n"
    )
    return note.upper()


_ASSETS = ("pump", "boiler", "lift", "conveyor", "air handler", "generator", "gate", "compressor", "door closer")
_FAULTS = (
    "leak at the seal",
    "bearing noise",
    "no power",
    "sensor fault",
    "belt worn",
    "filter blocked",
    "valve stuck",
)
_PARTS = ("seal kit", "bearing 6204", "V-belt A42", "fuse 10 A", "filter F7", "gasket", "relay 24 V", "sensor PT100")
_ENGINEERS = ("Marsh", "Doyle", "Iqbal", "Stone", "Vega", "Wells")


def work_order(r: random.Random) -> str:
    """Maintenance orders of a building, for the public corpus: notes in an owner's manner about other things."""
    orders = []
    for _ in range(r.randint(2, 5)):
        asset, fault, hours = r.choice(_ASSETS), r.choice(_FAULTS), r.randint(1, 9)
        parts = "".join(
            f"  {n}. {part} x{r.randint(1, 4)}\n" for n, part in enumerate(r.sample(_PARTS, r.randint(1, 3)), 1)
        )
        orders.append(
            f"WORK ORDER {r.randint(10000, 99999)}  Site: B{r.randint(1, 40)}  Date: {r.randint(1, 28):02d}/"
            f"{r.randint(1, 12):02d}\nAsset: {asset} no {r.randint(1, 60)}  Hours: {hours}.{r.choice('05')}\n"
            f"Fault: {fault}, reported {r.randint(1, 9)} d ago. Pressure {r.randint(12, 60) / 10} bar, "
            f"temp {r.randint(18, 85)} C, current {r.randint(2, 40)} A.\n"
            f"Action: {r.choice(('replaced', 'cleaned', 'adjusted', 'repaired'))} and tested, "
            f"{r.choice(('in service', 'on watch', 'needs follow-up'))}.\nParts:\n{parts}Signed: "
            f"{r.choice(_ENGINEERS)}\n"
        )
    return "\n".join(orders)


def sums(r: random.Random) -> str:
    """Rows of sums and of conversions, for the public corpus: arithmetic that is not an owner's worked problems."""
    rows = []
    for _ in range(r.randint(20, 60)):
        a, b = r.randint(2, 99), r.randint(2, 99)
        rows.append(
            r.choice(
                (
                    f"{a} + {b} = {a + b}",
                    f"{a + b} - {b} = {a}",
                    f"{a} x {b % 13} = {a * (b % 13)}",
                    f"{a} m = {100 * a} cm",
                    f"{a} h = {60 * a} min",
                    f"sum of {a} and {b} is {a + b}",
                )
            )
        )
    return "\n".join(rows) + "\n"
