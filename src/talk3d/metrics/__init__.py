"""How good pictures, faces and motion are: functions on arrays, one definition each. Imports nothing from stages."""
