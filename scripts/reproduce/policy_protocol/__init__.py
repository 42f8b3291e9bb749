"""MADPO's protocol on a real model: data of three qualities, equal tuning, seeds, judged by gold reward and KL."""
