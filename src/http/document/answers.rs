//! What operations accept and answer, apart from schemas.

use utoipa::openapi::path::ParameterIn;
use utoipa::openapi::schema::SchemaType;
use utoipa::openapi::{OpenApi, RefOr, Schema, Type};

use crate::http::openapi::operations;

/// Describes every success whose handler has no description. OpenAPI requires one, and the library leaves empty ones
/// out.
pub(super) fn describe(document: &mut OpenApi) {
    for (_, _, operation) in operations(document) {
        for (status, response) in &mut operation.responses.responses {
            let RefOr::T(response) = response else {
                continue;
            };
            if !response.description.is_empty() {
                continue;
            }
            let description = match status.as_str() {
                "200" => "What was asked for",
                "201" => "It was made",
                "202" => "It waits for a worker",
                _ => continue,
            };
            response.description = description.to_owned();
        }
    }
}

/// Marks operations that need no key as open, explicitly.
pub(super) fn open(document: &mut OpenApi) {
    for (_, _, operation) in operations(document) {
        operation.security.get_or_insert_default();
    }
}

/// Removes `null` from the types of parameters: an optional parameter is left out, and cannot be sent as null.
pub(super) fn require_values(document: &mut OpenApi) {
    for (_, _, operation) in operations(document) {
        for parameter in operation.parameters.iter_mut().flatten() {
            let RefOr::T(parameter) = parameter else {
                continue;
            };
            if parameter.parameter_in == ParameterIn::Path {
                continue;
            }
            if let Some(RefOr::T(Schema::Object(schema))) = &mut parameter.schema
                && let SchemaType::Array(types) = &mut schema.schema_type
            {
                types.retain(|it| *it != Type::Null);
                if let [one] = types.as_slice() {
                    schema.schema_type = SchemaType::Type(one.clone());
                }
            }
        }
    }
}
