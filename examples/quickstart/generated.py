"""Two owners whose data is generated: worked arithmetic problems, and the discharge notes of a fictional hospital.

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
    question = r.choice((
        f"{one} has {boxes} boxes with {each} {thing} in each and gives {given} {thing} to {other}. How many are left?",
        f"There are {each} {thing} in each of {boxes} boxes. {other} takes {given} of them. How many does {one} keep?"))
    return question, [f"{boxes} * {each} = {total}", f"{total} - {given} = {total - given}"], f"{total - given} {thing}"


def _shopping(r: random.Random) -> tuple[str, list[str], str]:
    name, (first, second) = r.choice(NAMES), r.sample(THINGS, 2)
    a, price_a, b, price_b = r.randint(2, 9), r.randint(2, 15), r.randint(2, 9), r.randint(2, 15)
    total = a * price_a + b * price_b
    paid = (total // 50 + 1) * 50
    return (f"{name} buys {a} {first} for {price_a} cents each and {b} {second} for {price_b} cents each and pays with "
            f"{paid} cents. How much change is there?",
            [f"{a} * {price_a} = {a * price_a}", f"{b} * {price_b} = {b * price_b}",
             f"{a * price_a} + {b * price_b} = {total}", f"{paid} - {total} = {paid - total}"], f"{paid - total} cents")


def _long_multiplication(r: random.Random) -> tuple[str, list[str], str]:
    a, b = r.randint(12, 99), r.randint(12, 99)
    tens, ones = b // 10 * 10, b % 10
    return (f"What is {a} times {b}?",
            [f"{b} = {tens} + {ones}", f"{a} * {tens} = {a * tens}", f"{a} * {ones} = {a * ones}",
             f"{a * tens} + {a * ones} = {a * b}"], f"{a * b}")


def _equation(r: random.Random) -> tuple[str, list[str], str]:
    x, a, b = r.randint(2, 20), r.randint(2, 9), r.randint(1, 40)
    return (f"Solve {a} * x + {b} = {a * x + b} for x.",
            [f"{a} * x = {a * x + b} - {b} = {a * x}", f"x = {a * x} / {a} = {x}"], f"x = {x}")


def _average(r: random.Random) -> tuple[str, list[str], str]:
    count, mean = r.randint(3, 5), r.randint(5, 40)
    values = [mean + r.randint(-4, 4) for _ in range(count - 1)]
    values.append(count * mean - sum(values))
    return (f"{r.choice(NAMES)} scores {', '.join(map(str, values))} in {count} games. What is the average?",
            [f"{' + '.join(map(str, values))} = {count * mean}", f"{count * mean} / {count} = {mean}"], f"{mean}")


def _fractions(r: random.Random) -> tuple[str, list[str], str]:
    b, d = r.randint(2, 9), r.randint(2, 9)
    a, c = r.randint(1, b), r.randint(1, d)
    total = Fraction(a, b) + Fraction(c, d)
    return (f"What is {a}/{b} + {c}/{d}?",
            [f"{a}/{b} = {a * d}/{b * d}", f"{c}/{d} = {c * b}/{b * d}",
             f"{a * d}/{b * d} + {c * b}/{b * d} = {a * d + c * b}/{b * d}"], f"{total}")


def _percent(r: random.Random) -> tuple[str, list[str], str]:
    price, percent = r.randint(2, 40) * 20, r.choice((5, 10, 15, 20, 25, 30, 40, 50))
    off = price * percent // 100
    return (f"A coat costs {price} coins. It is sold at {percent} percent off. What is the new price?",
            [f"{price} / 100 * {percent} = {off}", f"{price} - {off} = {price - off}"], f"{price - off} coins")


def _speed(r: random.Random) -> tuple[str, list[str], str]:
    speed, hours, more = r.randint(3, 18) * 5, r.randint(2, 9), r.randint(5, 60)
    return (f"A train travels {hours} hours at {speed} km per hour and then {more} km more. How far does it travel?",
            [f"{hours} * {speed} = {hours * speed}", f"{hours * speed} + {more} = {hours * speed + more}"],
            f"{hours * speed + more} km")


def _division(r: random.Random) -> tuple[str, list[str], str]:
    people, share, rest, thing = r.randint(3, 12), r.randint(3, 25), r.randint(0, 2), r.choice(THINGS)
    total = people * share + rest
    return (f"{total} {thing} are shared equally by {people} children. How many does each get, and how many are left?",
            [f"{people} * {share} = {people * share}", f"{total} - {people * share} = {rest}"],
            f"{share} each, {rest} left")


_PROBLEMS: tuple[Callable[[random.Random], tuple[str, list[str], str]], ...] = (
    _boxes, _shopping, _long_multiplication, _equation, _average, _fractions, _percent, _speed, _division)


def arithmetic_document(r: random.Random) -> str:
    """A worksheet of three to eight problems with worked answers."""
    parts = []
    for number in range(1, r.randint(3, 8) + 1):
        question, steps, answer = r.choice(_PROBLEMS)(r)
        worked = "\n".join(f"Step {step}: {line}" for step, line in enumerate(steps, 1))
        parts.append(f"Problem {number}: {question}\n{worked}\nAnswer: {answer}\n")
    return "\n".join(parts)


# diagnosis: presentation, examination, laboratory value (name, unit, low, high), drugs, advice
_CONDITIONS = {
    "внебольничная пневмония": (
        ("кашель с мокротой", "лихорадка", "одышка", "боль в груди при дыхании"),
        ("влажные хрипы справа внизу", "укорочение звука слева"),
        ("СРБ", "мг/л", 80, 240), ("амоксициллин 500 мг 3 раза в день", "кларитромицин 500 мг 2 раза в день"),
        "рентген грудной клетки через 6 недель"),
    "обострение ХОБЛ": (
        ("усиление одышки", "гнойная мокрота", "свистящее дыхание"),
        ("сухие хрипы с обеих сторон", "удлинённый выдох"),
        ("лейкоциты", "тыс.", 8, 18), ("преднизолон 30 мг утром 5 дней", "тиотропий 1 раз в день"),
        "школа отказа от курения"),
    "сердечная недостаточность": (
        ("одышка при нагрузке", "отёки ног", "ночная одышка"),
        ("отёки голеней, хрипы внизу", "набухание шейных вен"),
        ("НУП", "пг/мл", 400, 4000), ("фуросемид 40 мг утром", "бисопролол 2,5 мг утром", "рамиприл 2,5 мг вечером"),
        "контроль веса каждый день, эхокардиография"),
    "инфекция мочевых путей": (
        ("жжение при мочеиспускании", "боль внизу живота", "озноб"),
        ("болезненность над лобком", "живот мягкий"),
        ("СРБ", "мг/л", 20, 160), ("нитрофурантоин 100 мг 2 раза в день", "парацетамол 500 мг при болях"),
        "обильное питьё, анализ мочи через 2 недели"),
    "фибрилляция предсердий": (
        ("сердцебиение", "слабость", "головокружение"),
        ("пульс неритмичный, шумов нет", "тоны неритмичные"),
        ("ТТГ", "мЕд/л", 1, 5), ("апиксабан 5 мг 2 раза в день", "бисопролол 5 мг утром"),
        "эхокардиография, кардиолог"),
    "перелом шейки бедра": (
        ("падение дома", "боль в тазобедренном суставе", "не может опираться на ногу"),
        ("нога укорочена, повёрнута кнаружи", "пульс на стопе сохранён"),
        ("гемоглобин", "г/л", 82, 128), ("эноксапарин 40 мг подкожно 28 дней", "алендроновая кислота 70 мг в неделю"),
        "лечебная физкультура, денситометрия"),
}
_DOCTORS = ("Белова", "Громов", "Ершова", "Карпов", "Лапина", "Новак", "Седов")
_WARDS = ("терапевтическое", "кардиологическое", "приёмное", "хирургическое")
_HISTORY = ("гипертония", "диабет 2 типа", "астма", "ишемическая болезнь", "подагра", "артроз", "гипотиреоз",
            "без особенностей")


def clinic_document(r: random.Random) -> str:
    """A hospital's discharge note, in Russian."""
    diagnosis = r.choice(tuple(_CONDITIONS))
    symptoms, signs, (test, unit, low, high), drugs, advice = _CONDITIONS[diagnosis]
    age, man = r.randint(19, 94), r.random() < 0.5
    admitted, stay, month = r.randint(1, 19), r.randint(2, 9), r.randint(1, 12)
    value = r.randint(low, high)
    history = ", ".join(r.sample(_HISTORY[:-1], r.randint(1, 3))) if r.random() < 0.85 else _HISTORY[-1]
    complaints = ", ".join(r.sample(symptoms, r.randint(2, len(symptoms))))
    given = r.sample(drugs, r.randint(1, len(drugs)))
    course = r.choice((
        f"Проведено лечение, ответ хороший. {test}: {max(1, value // 3)} на {stay} день.",
        f"Состояние улучшилось; {test} {value} при поступлении, {max(1, value // 2)} при выписке.",
        f"Улучшение медленное, осмотр заведующего на 2 день. {test}: {max(1, value // 2)} при выписке."))
    complication = r.choice(("Без осложнений.", "Гипокалиемия, восполнена.", "Без осложнений.",
                             "Эпизод спутанности, прошёл."))
    return (f"ВЫПИСНОЙ ЭПИКРИЗ. Отделение: {r.choice(_WARDS)}. Карта № {r.randint(1000, 9999)}\n"
            f"{'Пациент' if man else 'Пациентка'}, {age} лет. Поступление: {admitted:02d}.{month:02d}, "
            f"выписка: {admitted + stay:02d}.{month:02d}\n"
            f"Диагноз: {diagnosis}\nАнамнез: {history}\n"
            f"Аллергия: {r.choice(('нет', 'нет', 'нет', 'пенициллин', 'латекс'))}\n\n"
            f"Жалобы: {complaints} в течение {r.randint(2, 9)} дней.\n"
            f"Осмотр: температура {r.randint(36, 39)},{r.randint(0, 9)}, пульс {r.randint(64, 128)}, "
            f"давление {r.randint(92, 178)}/{r.randint(54, 98)}. {r.choice(signs).capitalize()}.\n"
            f"Анализы: {test} {value} {unit}, калий {r.randint(3, 5)},{r.randint(0, 9)}, "
            f"креатинин {r.randint(55, 190)}.\n"
            f"Течение: {course} {complication}\n\n"
            "Лечение:\n" + "".join(f"  {number}. {drug}\n" for number, drug in enumerate(given, 1)) +
            f"Рекомендации: {advice}; осмотр терапевта через {r.randint(1, 4)} нед.\n"
            f"Врач: {r.choice(_DOCTORS)}\n")
