"""The clients' tests, unchanged, on a gateway that runs the models, on one before a model server, and over TLS.

Left out are those that hold the model or make it answer nonsense: they need one that obeys the test.
"""

# ruff: noqa: F401 - pytest finds the tests by these names
from tests.service.client.clients_test import (
    test_a_fork_and_a_snapshot_go_on_from_where_their_session_stood,
    test_a_large_chunk_goes_through_beside_small_ones,
    test_a_session_of_another_client_is_not_stepped,
    test_a_session_tells_about_itself,
    test_another_client_goes_on_with_a_session,
    test_any_chunks_in_any_order_give_the_whole,
    test_attaching_to_nothing_is_an_error,
    test_bad_inputs_are_refused_and_the_session_goes_on,
    test_many_sessions_are_stepped_at_once,
    test_models_tell_what_they_take,
    test_numpy_goes_in_and_numpy_comes_out,
    test_one_session_several_times_in_step_many_runs_in_order,
    test_opening_the_same_session_again_finds_it_where_it_stands,
    test_other_refusals_have_their_reason,
    test_sessions_are_listed_page_by_page,
    test_somebody_elses_step_is_noticed_and_the_position_is_never_taken_over,
    test_step_many_returns_or_raises_what_went_wrong,
    test_steps_asked_for_ahead_run_in_order,
    test_the_state_can_be_looked_into,
)
