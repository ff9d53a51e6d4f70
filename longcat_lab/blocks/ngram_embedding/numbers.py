"""Whole-number arithmetic behind table sizes: primes, and how evenly a hash spreads neighbouring ids."""

from __future__ import annotations

import math

WITNESSES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37)  # exact below 3.3e24 (Sorenson and Webster, arXiv 1509.00864)


def is_prime(number: int) -> bool:
    """Miller and Rabin's test with witnesses that make it exact for every table size."""
    if number < 2 or any(number % small == 0 for small in WITNESSES):
        return number in WITNESSES
    odd, twos = number - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for witness in WITNESSES:
        x = pow(witness, odd, number)
        if x in (1, number - 1):
            continue
        for _ in range(twos - 1):
            x = x * x % number
            if x == number - 1:
                break
        else:
            return False
    return True


def shortest_vector(base: int, modulus: int) -> tuple[int, int]:
    """The shortest difference (dt, dp) of two bigrams that always share a row: dt + base dp = 0 mod modulus, not both zero.

    Two 2-grams whose current tokens differ by dt and whose previous ones by dp collide. Token ids follow frequency, so a short vector
    makes frequent 2-grams collide with one another; a hash that spreads well has none much below sqrt(modulus). This is the spectral
    test of random number generators (Knuth, The Art of Computer Programming 2, 3.3.4) in two dimensions, by Gauss's reduction.
    """
    a, b = (modulus, 0), (-base % modulus, 1)
    while True:
        if _dot(a, a) < _dot(b, b):
            a, b = b, a
        times = _nearest(_dot(a, b), _dot(b, b))
        if times == 0:
            return b
        a = (a[0] - times * b[0], a[1] - times * b[1])


def evenness(base: int, modulus: int) -> float:
    """Length of the shortest vector over sqrt(modulus): about 0.5 to 1.07 for a good size, near 0 where frequent bigrams collide."""
    return math.hypot(*shortest_vector(base, modulus)) / math.sqrt(modulus)


def least_product(base: int, modulus: int, limit: int) -> tuple[int, int]:
    """The difference (dt, dp) of two bigrams that share a row with the smallest |dt| |dp| (0 counted as 1), both below `limit`.

    Frequent bigrams have one frequent token at least: they lie along the two axes, not in a disc, so that also a long vector joins many of
    them if it is short in one direction. Products below modulus / 2 belong to convergents of base / modulus (Legendre), which Euclid's
    algorithm runs through; (0, 0) where there is none.
    """
    best, (remainder, times), (after, times_after) = (0, 0), (modulus, 0), (base % modulus, 1)
    while True:  # after = base * times_after mod modulus
        if max(after, abs(times_after)) < limit and (best == (0, 0) or _product(after, times_after) < _product(*best)):
            best = (-after, times_after)
        if after == 0:
            return best if 2 * _product(*best) < modulus else (0, 0)
        quotient = remainder // after
        remainder, after = after, remainder - quotient * after
        times, times_after = times_after, times - quotient * times_after


def spread(base: int, modulus: int, limit: int) -> float:
    """The least product over the modulus, at most 0.5: Zaremba's figure of merit, seen from the bigrams that collide.

    Of sizes drawn at random, those above 0.02 make no more bigrams collide than a uniform hash would, on text with Zipf's frequencies;
    those below 0.005 from 1.2 times as many on. Source: Niederreiter, Random Number Generation and Quasi-Monte Carlo Methods (1992), ch. 5.
    """
    vector = least_product(base, modulus, limit)
    return 0.5 if vector == (0, 0) else _product(*vector) / modulus


def nearest_fraction(base: int, modulus: int, vector: tuple[int, int]) -> tuple[int, int]:
    """(p, q): modulus is near p / q of the base, by a colliding difference (dt, dp): dt + base dp = q modulus, and p = |dp|."""
    return abs(vector[1]), abs((vector[0] + base * vector[1]) // modulus)


def _product(dt: int, dp: int) -> int:
    return max(1, abs(dt)) * max(1, abs(dp))


def _dot(a: tuple[int, int], b: tuple[int, int]) -> int:
    return a[0] * b[0] + a[1] * b[1]


def _nearest(a: int, b: int) -> int:
    """a / b to the nearest whole number, exact at any size."""
    return (2 * a + b) // (2 * b)
